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
# # What a window loses
#
# **Would the last few positions do as well as those that the indexer selects?** Window attention needs no indexer. Here
# the indexer is restricted to a window, in all layers and in one at a time, and the loss on held-out text compared.
#
# *For the real checkpoint* set `SOURCE` to a DeepSeek-V3.2 folder in Hugging Face layout and give `ds.load` a mesh, or
# `experts="host"`. In NVFP4 it takes 411 GB on disk, once more converted, and in memory; `dsv32 fit` says what else.
# It selects 2048 positions: take a longer text, `LENGTH` of 8,000 and more, and windows up to 2048.
#
# *Fixed by rule:* the first ten rows of the held-out file, windows of half the last down from what the model selects,
# and the first four positions, of which others have written. *Chosen by hand, perhaps after looking:* the window of 32
# in single layers.

# %%
import tempfile
from pathlib import Path

import numpy as np

import dsv32_jax as ds
from dsv32_jax import convert, inspect
from dsv32_jax.evaluation.perplexities import estimate_mean

DEMO = Path(ds.__file__).parent / "demo_checkpoint"
SOURCE = DEMO

target = Path(tempfile.mkdtemp()) / "converted"
convert.convert(SOURCE, target)
model = ds.load(target)
tokenizer = ds.chat.Tokenizer.load(target, model.cfg)
text = (DEMO / "heldout.txt").read_text(encoding="utf-8")

LENGTH, ROWS = 512, 10
topk = model.cfg.index_topk
ids = tokenizer.encode(text)
rows = [ids[start : start + LENGTH] for start in range(0, ROWS * LENGTH, LENGTH)]


def losses(model) -> list[np.ndarray]:
    """The loss of the tokens of each row that have more than `topk` before them."""
    return [-np.array(row[topk:]) for row in ds.score(model, rows).logprobs]


indexed = losses(model)


def change(**edits) -> tuple[float, float]:
    """The change of the loss by an edit, and its standard error over rows."""
    found = estimate_mean([a - b for a, b in zip(losses(inspect.edit(model, **edits)), indexed, strict=True)])
    return found.mean, found.standard_error


# %% [markdown]
# ## In all layers
#
# The last 16 to 128 positions instead of the 128 that the indexer selects; and the same with the first four positions
# of the text, on which attention is said to rest.

# %%
windows = (16, 32, 64, topk)
plain = [change(window=window) for window in windows]
first = [change(window=window, positions=range(4)) for window in windows]
dense = change(index_topk=LENGTH)
print(f"dense attention, all {LENGTH} positions: {dense[0]:+.4f} ± {dense[1]:.4f} nats")
for window, a, b in zip(windows, plain, first, strict=True):
    print(f"last {window:3}: {a[0]:+.4f} ± {a[1]:.4f}; with the first four positions {b[0]:+.4f} ± {b[1]:.4f}")
named = {"last positions": plain, "and the first four": first}
inspect.plots.lines(
    {name: [mean for mean, _ in values] for name, values in named.items()},
    "window (positions)",
    "change of loss (nats a token)",
    windows,
    {name: [error for _, error in values] for name, values in named.items()},
)

# %% [markdown]
# **A window of as many positions as the indexer selects costs 0.06 nats a token, a quarter of it 0.45**; the first four
# positions win back about a fifth. Dense attention would gain nothing that can be told from zero: what the indexer
# leaves out does not matter, what a window leaves out does. Bars are one standard error over texts.
#
# ## Layer by layer
#
# A window of 32 positions in one layer, all others as they are.

# %%
layers = {f"layer {i}": change(window=32, layers=[i]) for i in range(model.cfg.num_hidden_layers)}
inspect.plots.groups({"window of 32": layers}, "layer with the window", "change of loss (nats a token)")

# %% [markdown]
# **Nearly all of the loss is the last layer's**, which in notebook 9 fetches a name from where it was written. Any one
# of the other layers would do with a window of 32.
