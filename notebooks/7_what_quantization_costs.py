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
# # What quantization costs
#
# **What does NVFP4 change in what the model says?** The small bundled model in its own FP8, and in NVFP4 with two ways
# to choose block scales. The error of the weights matters less than its effect on predictions: how far they move (KL),
# how often the most likely token stays the same, and the loss on the actual tokens.
#
# *For the real checkpoint* set `SOURCE` to a DeepSeek-V3.2 folder in Hugging Face layout. It is converted three times:
# 708 GB in FP8 and twice 411 GB on disk. Two are loaded one after the other; `dsv32 fit` says what memory that takes.
#
# *Fixed by rule:* the first six windows of the held-out file, and both ways to choose scales. *Chosen after looking:*
# the examples of disagreement are the worst four by KL, so they are no sample.

# %%
import tempfile
from pathlib import Path

import numpy as np

import dsv32_jax as ds
from dsv32_jax import convert

SOURCE = Path(ds.__file__).parent / "demo_checkpoint"

scratch = Path(tempfile.mkdtemp())
convert.convert(SOURCE, scratch / "fp8")
for scales in ("rtn", "mse"):
    convert.convert(SOURCE, scratch / scales, to="nvfp4", policy="full", scales=scales)

# %% [markdown]
# ## Predictions
#
# Both models read the same windows of held-out text. Perplexity varies a great deal from window to window, so its
# standard error is large; the *difference* of losses on the same tokens is known ten times better. Searched scales
# (`mse`) move predictions less than rounding to nearest (`rtn`).

# %%
print(f"{'NVFP4':6}{'KL':>18}{'same top token':>18}{'loss':>20}")
for scales in ("rtn", "mse"):
    found = ds.evaluation.kl(scratch / "fp8", scratch / scales, limit=6)
    kl, same, loss = found.kl, found.same_top, found.loss
    print(
        f"{scales:6}{kl.mean:9.4f} ± {kl.standard_error:.4f}{100 * same.mean:16.1f} %"
        f"{loss.mean:+11.4f} ± {loss.standard_error:.4f}"
    )

# %% [markdown]
# Where the two models disagree most: the text before, the actual token, and the most likely token of each model.

# %%
for worst in found.worst[:4]:
    print(f"KL {worst.kl:.2f}: ...{worst.before[-30:]!r} -> {worst.token!r}: {worst.top_a!r} became {worst.top_b!r}")

# %% [markdown]
# ## Layer by layer
#
# The relative errors of weights and of outputs for the same activations. An NVFP4 matrix has an error of 8 to 10 %;
# weights that stay BF16 lower the mean. Outputs pass through two or three matrices, so their errors are larger.


# %%
def mean(errors) -> str:
    known = [error for error in errors if error is not None]
    return f"{100 * np.mean(known):8.1f} %" if known else f"{'-':>10}"


print(f"{'part':12}{'weights':>10}{'outputs':>10}{'experts':>10}")
for part in ds.evaluation.layers(scratch / "fp8", scratch / "mse", tokens=128):
    print(f"{part.part:12}{mean(part.weights.values())}{mean(part.outputs.values())}{mean(part.expert_outputs)}")

# %% [markdown]
# ## All formats
#
# On the whole held-out text (`python -m tests.findings`); losses are differences from BF16 on the same tokens:
#
# | weights | MB | perplexity | loss | KL | same top token |
# |---|---|---|---|---|---|
# | BF16; FP8 (the source) gives the same | 26.0; 15.6 | 11.480 | | | |
# | NVFP4 `default`, `rtn` | 12.6 | 11.729 | +0.0214 ± 0.0021 | 0.0566 | 88.4 % |
# | NVFP4 `default`, four-over-six | 12.6 | 11.793 | +0.0269 ± 0.0019 | 0.0490 | 89.0 % |
# | NVFP4 `default`, `mse` | 12.6 | 11.702 | +0.0191 ± 0.0020 | 0.0443 | 89.9 % |
# | NVFP4 `full`, `rtn` | 10.6 | 11.875 | +0.0338 ± 0.0025 | 0.0831 | 85.9 % |
# | NVFP4 `full`, four-over-six | 10.6 | 11.978 | +0.0424 ± 0.0026 | 0.0701 | 87.1 % |
# | NVFP4 `full`, `mse` | 10.6 | 11.683 | +0.0175 ± 0.0026 | 0.0633 | 87.8 % |
# | NVFP4 `experts-only`, `mse` | 13.4 | 11.541 | +0.0053 ± 0.0015 | 0.0199 | 92.9 % |
# | BF16 with an FP8 cache | 26.0 | 11.485 | +0.0004 ± 0.0005 | 0.0030 | 98.0 % |
# | dense attention instead of 128 of 1024 tokens | 15.6 | 11.434 | -0.0040 ± 0.0017 | 0.0185 | 93.7 % |
#
# Four-over-six has a lower KL than rounding to nearest, but a higher loss, by 0.0055 ± 0.0024 nats. The held-out loss
# of a small model can rise while its predictions come closer to those of the source; KL measures faithfulness.
