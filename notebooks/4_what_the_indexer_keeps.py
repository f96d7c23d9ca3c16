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
# Sparse attention sees only the tokens that the lightning indexer scores highest. Which are these, how much of what
# dense attention would look at do they hold, and does a detail that matters survive? Runs on the small model that is
# shipped, which selects 128 positions, the real one 2048; set `SOURCE` to a DeepSeek-V3.2 folder in Hugging Face layout
# to use other weights.

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
# ## What is selected
#
# Each line is a token, each column a position before it; bright positions score highest, white ones are not attended
# to. Up to 128 tokens everything is selected (the full triangle). After that, see the bright diagonal (recent tokens)
# and the vertical lines: positions that many later tokens come back to.

# %%
inspect.plots.selection(trace, LAYER)

# %% [markdown]
# The positions that the last hundred tokens select most often, apart from the last 64, and their surroundings:

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
# A generation never computes what dense attention would have looked at. `inspect.kept_mass` does, beside a forward over
# given tokens: the share of dense attention's weight that lies on the selected positions (mean over heads), next to the
# best choice of as many positions, and to simply the last ones. See how the indexer comes within a few percent of the
# best choice in every layer, and that the last positions alone would lose most in layers 0, 1 and 4.

# %%
mass = inspect.kept_mass(model, [ids[start : start + 5 * topk] for start in (200, 5000, 9000)])
inspect.plots.kept_mass(mass, first=2 * topk)

# %% [markdown]
# By layer and position, in the first text: 100 % as long as everything is selected, then less as the text grows. Dark
# columns are tokens whose attention reaches for more than 128 positions.

# %%
inspect.plots.kept_mass_by_position(mass)

# %% [markdown]
# The trace's own measure needs no dense attention: the spread (entropy) of the weights among what was selected. Its
# exponential is the number of positions that a head effectively looks at (here the mean of 16 tokens). See how layers 2
# to 4 look at ten to twenty: they lose little. Layer 0 looks at nearly all that it is given, and would look at more.

# %%
effective = np.exp(trace["spread"][:, 0])
smooth = {f"layer {i}": np.convolve(row[:length], np.ones(16) / 16, "valid") for i, row in enumerate(effective)}
inspect.plots.lines(smooth, "position", "positions in effective use")

# %% [markdown]
# ## A needle
#
# One line that matters is put at the start, then come lines of unrelated code, then the beginning of the same line.
# Where does the position that holds the answer rank among the index scores of the last tokens? Above the dashed line
# attention sees it. The tokens on the axis are those of the question; after the last one the answer is due. In the
# small model most layers have lost the needle by then; see how the last layer reaches for it in the last moment.

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
