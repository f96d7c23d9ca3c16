# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # NVFP4 up close
#
# A weight from its bits to its values, why it takes two levels of scales, and where four bits hurt. Runs on the small
# model that is shipped; set `SOURCE` to a DeepSeek-V3.2 folder in Hugging Face layout to look at other weights (and
# `LAYER`, `EXPERT` to choose one). Only the weights that are looked at are read.

# %%
import tempfile
from pathlib import Path

import numpy as np

import dsv32_jax as ds
from dsv32_jax import convert, inspect
from dsv32_jax.quantization import quantize

SOURCE = Path(ds.__file__).parent / "demo_checkpoint"
LAYER, EXPERT = 3, 5

scratch = Path(tempfile.mkdtemp())
for scales in ("rtn", "four-over-six", "mse"):
    convert.convert(SOURCE, scratch / scales, to="nvfp4", scales=scales)
source = inspect.Folder(SOURCE)
quantized = {scales: inspect.Folder(scratch / scales) for scales in ("rtn", "four-over-six", "mse")}
path = f"layers.{LAYER}.ffn.w_up_EMD"
weight, original = quantized["rtn"].weight(path, EXPERT), source.weight(path, EXPERT)
weight, original

# %% [markdown]
# ## From bits to values
#
# Sixteen neighbours of a row are one block. Each is a 4-bit code, one of 16 numbers (E2M1: a sign, two bits of
# exponent, one of mantissa). The block has one 8-bit scale (E4M3), the matrix one float32 scale; the value is the
# product of the three. The last column is what the source holds: the codes lie at most half a step away from it.

# %%
codes, scale = weight.parts["codes"][0, :8], weight.parts["block_scale"][0, 0]
tensor_scale = weight.parts["tensor_scale"].item()
print(f"block scale {float(scale):g} (byte {scale.view(np.uint8):08b}), tensor scale {tensor_scale:.6g}\n")
print("byte      code  E2M1     value    source")
for i, (value, before) in enumerate(zip(weight.values()[0, :16], original.values()[0, :16], strict=True)):
    nibble = codes[i // 2] >> 4 * (i % 2) & 15
    byte = f"{codes[i // 2]:08b}" if i % 2 == 0 else ""
    print(f"{byte:8}  {nibble:04b}  {quantize.E2M1[nibble]:4g}  {value:8.5f}  {before:8.5f}")

# %% [markdown]
# ## Codes and scales
#
# How often each of the 16 numbers occurs in this matrix. It is no bell: 2 and 3 stand for wide intervals, 1.5 for a
# narrow one, and 6 and -6 are frequent because rounding to nearest brings the largest element of every block there.
# Minus zero (light) has a code of its own, which is spent on nothing: a sixteenth of what four bits can say.

# %%
found = inspect.statistics(weight)
inspect.plots.codes(found)

# %% [markdown]
# The block scales: one block reaches 448, the largest E4M3 number, because the tensor scale is chosen so; the others
# follow the size of their own largest element. E4M3 has three bits of mantissa: 8 steps between powers of two.

# %%
print(f"{found.blocks} blocks: {found.zero_blocks} of zeros, {found.saturated_blocks} at 448")
print(
    f"{inspect.count_clipped(weight, original)} of {original.values().size} elements are larger than their block can hold"
)
inspect.plots.scales(found)

# %% [markdown]
# Elements are larger than their block can hold where the block's scale was rounded down: E4M3 is within 6 % of the
# ideal scale, no more.
#
# ## Why two scales
#
# E4M3 reaches from 2^-9 to 448, with fewer and fewer steps below 2^-6. The float32 scale of the matrix brings every
# matrix to the same place in that range, whatever its size. Here this expert's weights are made smaller step by step:
# with the tensor scale (solid) the error stays where it is, with block scales alone (dashed) it leaps as soon as blocks
# need scales that E4M3 does not have.

# %%
w = original.values()


def error(w: np.ndarray, amax: np.float32 | None = None) -> float:
    stored = quantize.nvfp4_dequantize(*quantize.nvfp4_quantize(w, amax=amax))
    return 100 * float(np.linalg.norm(stored - w) / np.linalg.norm(w))


smaller = [w * np.float32(2.0**-k) for k in range(9)]
inspect.plots.lines(
    {
        "two scales": [error(w) for w in smaller],
        "block scales alone": [error(w, amax=np.float32(6 * 448)) for w in smaller],
    },
    "weights divided by 2^x",
    "||error|| / ||weight|| (%)",
)

# %% [markdown]
# ## Three ways to choose a block's scale
#
# To nearest (RTN) the largest element becomes 6. Four-over-six may bring it to 4 instead, where the steps below are
# finer for the others; MSE searches. Beside this expert stands a matrix of Gaussian noise, where the three reach 9.5,
# 8.7 and 8.1 %: trained weights that went through FP8 are no easier.

# %%
errors = {scales: 100 * original.error(folder.weight(path, EXPERT)) for scales, folder in quantized.items()}
inspect.plots.bars(errors, "||error|| / ||weight|| (%)", digits=2)

# %% [markdown]
# ## The error atlas
#
# The error of every routed expert in every layer. See how even it is: with a scale for each 16 weights, no expert is
# singled out, and the scale bar spans fractions of a percent. In a checkpoint where one square is bright, look at that
# expert.

# %%
first = source.config.first_k_dense_replace
errors = inspect.expert_errors(quantized["mse"], source)
inspect.plots.expert_errors(errors, range(first, source.config.num_hidden_layers))

# %% [markdown]
# And by kind of weight, in one layer. What the default policy keeps (the rest of attention, the indexer, the router)
# has no error at all.

# %%
layers = [folder.layer(LAYER) for folder in (source, quantized["mse"])]
for name, before in layers[0].items():
    after = layers[1][name]
    print(f"{name:22} {before.format:10} -> {after.format:10} {100 * before.error(after):6.2f} %")
