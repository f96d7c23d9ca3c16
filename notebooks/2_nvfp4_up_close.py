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
# **How do four bits hold a weight, why are there two levels of scales, and where does it hurt?** Shown on one expert of
# the small bundled model. `picture.save("file.pdf")` keeps a figure.
#
# *For the real checkpoint* set `SOURCE` to a DeepSeek-V3.2 folder in Hugging Face layout, and `LAYER` and `EXPERT`.
# Each of the three conversions below takes 411 GB on disk: leave out two. Only the weights shown here are read.
#
# *Fixed by rule:* the ways to choose scales, and that every expert is in the picture of errors. *Chosen by hand,
# perhaps after looking:* the layer and the expert that stand for the others, and powers of two that reach to where the
# error grows.

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
# Sixteen neighbours in a row form a block. Each element is a 4-bit code for one of 16 numbers (E2M1: a sign, two bits
# of exponent, one of mantissa). The block has one 8-bit scale (E4M3) and the matrix one float32 scale; a value is the
# product of the three. The last column shows the source: codes are at most half a step away from it.

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
# How often does each of the 16 numbers occur in this matrix?

# %%
found = inspect.statistics(weight)
inspect.plots.codes(found)

# %% [markdown]
# **Codes are not a bell curve**: 2 and 3 cover wide intervals, 1.5 a narrow one, and 6 and -6 are frequent because the
# scale maps the largest element of every block to one of them. Minus zero (light) has a code of its own that adds
# nothing: one sixteenth of all codes.

# %% [markdown]
# And the block scales, E4M3 numbers with three bits of mantissa: 8 steps between powers of two.

# %%
print(f"{found.blocks} blocks: {found.zero_blocks} of zeros, {found.saturated_blocks} at 448")
clipped = inspect.count_clipped(weight, original)
print(f"{clipped} of {original.values().size} elements exceed the largest value of their block")
inspect.plots.scales(found)

# %% [markdown]
# **One block (red) reaches 448, the largest E4M3 number, because the tensor scale is chosen that way; the others follow
# their own largest element.** In the source these elements are E4M3 numbers too, the largest of them 352. Times
# 448/352, none is nearest to 192 or 384, where 144 and 160 become 183 and 204. An element exceeds the largest value of
# its block if the block's scale was rounded down: E4M3 is within 6 % of the ideal scale.
#
# ## Why two scales
#
# E4M3 reaches from 2^-9 to 448, with fewer and fewer steps below 2^-6. The float32 scale of a matrix moves it to the
# same place in that range, whatever its size. Here the weights of this expert are divided by growing powers of two.

# %%
w = original.values()


def error(w: np.ndarray, amax: np.float32 | None = None) -> float:
    stored = quantize.nvfp4_dequantize(*quantize.nvfp4_quantize(w, amax=amax))
    return 100 * float(np.linalg.norm(stored - w) / np.linalg.norm(w))


smaller = [w * np.float32(2.0**-k) for k in range(9)]
inspect.plots.lines(
    {
        "two scales": [error(w) for w in smaller],
        "block scales only": [error(w, amax=np.float32(6 * 448)) for w in smaller],
    },
    "k (weights divided by $2^k$)",
    "||error|| / ||weight|| (%)",
)

# %% [markdown]
# **With the tensor scale (solid) the error is constant; with block scales alone (dashed) it jumps as soon as blocks
# need scales that E4M3 does not have.**
#
# ## Three ways to choose a block's scale
#
# Rounding to nearest (RTN) maps the largest element to 6. Four-over-six may map it to 4 instead, which makes the steps
# finer for the other elements; MSE searches.

# %%
errors = {scales: 100 * original.error(folder.weight(path, EXPERT)) for scales, folder in quantized.items()}
inspect.plots.bars(errors, "||error|| / ||weight|| (%)", digits=2)

# %% [markdown]
# **Searching takes a seventh off the error of rounding.** For Gaussian noise the three reach 9.5, 8.7 and 8.1 %;
# trained weights that went through FP8 are no easier.
#
# ## Errors of all experts
#
# The error of every routed expert in every layer.

# %%
first = source.config.first_k_dense_replace
errors = inspect.expert_errors(quantized["mse"], source)
layers = range(first, source.config.num_hidden_layers)
inspect.plots.heat(100 * errors, "expert", "layer", "||error|| / ||weight|| (%)", layers)

# %% [markdown]
# **No expert stands out**: the colour bar spans a tenth of a percentage point, because every 16 weights have a scale.
# In a checkpoint with a bright square, look at that expert.
#
# And by kind of weight, in one layer. Weights that the default policy does not quantize (the rest of attention, the
# indexer, the router) have no error at all.

# %%
layers = [folder.layer(LAYER) for folder in (source, quantized["mse"])]
for name, before in layers[0].items():
    after = layers[1][name]
    print(f"{name:22} {before.format:10} -> {after.format:10} {100 * before.error(after):6.2f} %")
