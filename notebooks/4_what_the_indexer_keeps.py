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
# # What the indexer keeps
#
# **Sparse attention sees only the positions that the lightning indexer scores highest. Which ones are these, how much
# of dense attention's weight do they keep, and does one important detail survive?** The small bundled model selects 128
# positions, the real one 2048: take longer texts there.
#
# *For the real checkpoint* set `SOURCE` to a DeepSeek-V3.2 folder in Hugging Face layout and give `ds.load` a mesh, or
# `experts="host"`. In NVFP4 it takes 411 GB on disk, once more converted, and in memory; `dsv32 fit` says what else.
#
# *Fixed by rule:* the number of selected positions, which is the model's. *Chosen by hand, perhaps after looking:*
# layer 3 of the first picture, where the texts begin, the needle, and the code that hides it: one example, which other
# needles need not follow.

# %%
import tempfile
from pathlib import Path

import numpy as np

import dsv32_jax as ds
from dsv32_jax import convert, inspect

DEMO = Path(ds.__file__).parent / "demo_checkpoint"
SOURCE = DEMO
LAYER = 3

target = Path(tempfile.mkdtemp()) / "converted"
convert.convert(SOURCE, target)
model = ds.load(target)
tokenizer = ds.chat.Tokenizer.load(target, model.cfg)
ids = tokenizer.encode((DEMO / "heldout.txt").read_text(encoding="utf-8"))
topk = model.cfg.index_topk
prompt = ids[200 : 200 + 3 * topk]
answer = ds.generate(model, [prompt], max_new_tokens=20).tokens[0]
trace = inspect.trace(model, [prompt + answer], {"indexer", "attention"})
trace

# %% [markdown]
# ## Selected positions
#
# Each row is a token, each column a position before it. Bright positions score highest, white ones are not selected.

# %%
inspect.plots.selection(trace, LAYER)

# %% [markdown]
# **Recent tokens (the diagonal) and a few positions that many later tokens come back to (vertical lines) are kept.** Up
# to 128 tokens everything is selected: the full triangle.
#
# The positions that the last hundred tokens select most often, other than the 64 most recent, with their context:

# %%
length = int(trace["length"][0])
chosen = trace["selected"][LAYER, 0, length - 100 : length]
count = np.bincount(chosen[chosen >= 0], minlength=length)[: length - 100 - 64]
for position in np.argsort(-count, kind="stable")[:6]:
    around = [tokenizer.decode([token]) for token in trace["tokens"][0, position - 2 : position + 3]]
    print(f"position {position:3}, selected by {count[position]:3} of 100: {''.join(around)!r}")

# %% [markdown]
# ## Attention mass kept
#
# Generation never computes the weights of dense attention. A trace of `"mass"` does, beside a replay of the given
# tokens: the share of dense attention's weight on the selected positions (mean over heads), beside the best choice of
# as many positions and the most recent ones.

# %%
mass = inspect.trace(model, [ids[start : start + 5 * topk] for start in (200, 5000, 9000)], {"mass"})
inspect.plots.attention_mass(mass, first=2 * topk)

# %% [markdown]
# **The indexer comes within a few percent of the best choice in every layer**; the most recent positions alone would
# lose most in layers 0, 1 and 4.
#
# By layer and position, in the first text:

# %%
inspect.plots.heat(100 * mass["mass_selected"][:, 0], "position", "layer", "attention mass kept (%)")

# %% [markdown]
# **All is kept as long as everything is selected, then less as the text grows.** Dark columns are tokens whose
# attention spreads over more than 128 positions.
#
# The trace has a measure that needs no dense attention: the spread (entropy) of the weights on selected positions. Its
# exponential is the effective number of positions a head attends to (here averaged over 16 tokens).

# %%
effective = np.exp(trace["spread"][:, 0])
smooth = {f"layer {i}": np.convolve(row[:length], np.ones(16) / 16, "valid") for i, row in enumerate(effective)}
inspect.plots.lines(smooth, "position", "effective number of positions")

# %% [markdown]
# **Layers 2 to 4 attend to ten or twenty positions and lose little; layer 0 attends to about 80 of 128, and would use
# more.**
#
# ## A needle
#
# One important line is at the start, then unrelated code follows, then the beginning of the same line. How does the
# position that holds the answer rank among the index scores of the last tokens? Above the dashed line attention sees
# it. The axis shows the tokens of the question; the answer comes after the last one.

# %%
needle = "MAGIC_TIMEOUT = 4711\n\n"
text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
filler = tokenizer.encode(text[text.index("class BaseProcess(object):") :])[:420]
line = tokenizer.encode(needle)
answer = next(i for i, token in enumerate(line) if "4" in tokenizer.decode([token]))
question = [*tokenizer.encode("\n\n"), *line[:answer]]
haystack = [*line, *filler, *question]
print("the needle:", repr(tokenizer.decode(haystack[answer : answer + 1])), "at position", answer, "of", len(haystack))
seen = ds.forward(model, [haystack], seen=True).seen
scores = np.stack([np.asarray(layer.index_score_BTS[0, -len(question) :], np.float32) for layer in seen])
ranks = 1 + (scores > scores[:, :, answer : answer + 1]).sum(axis=-1)
inspect.plots.needle(ranks, topk, [tokenizer.decode([token]) for token in question])

# %% [markdown]
# **The last layer finds the needle just in time.** Layer 0 selects it in the middle of the question, layers 1 to 3
# never do.
