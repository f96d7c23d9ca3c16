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
# # Speculation
#
# The drafting layer (MTP) proposes the next tokens, the model checks them all in one step, and what comes out is token
# for token what it would have made alone. How many drafts are kept, and where in a text are they right? Runs on the
# small model that is shipped; set `SOURCE` to a DeepSeek-V3.2 folder in Hugging Face layout, MTP layer included, to use
# other weights.

# %%
import keyword
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import dsv32_jax as ds
from dsv32_jax import convert, inspect
from dsv32_jax.model.cache import empty_layer

DEMO = Path(ds.__file__).parent / "demo_checkpoint"
SOURCE = DEMO
NEW = 96

target = Path(tempfile.mkdtemp()) / "converted"
convert.convert(SOURCE, target)
model = ds.load(target, dtype=jnp.float32)
tokenizer = ds.chat.Tokenizer.load(target, model.cfg)
ids = tokenizer.encode((DEMO / "heldout.txt").read_text(encoding="utf-8"))
prompts = [ids[start : start + 48] for start in range(1000, 9000, 1000)]

# %% [markdown]
# ## How many are kept
#
# With more drafts a step makes more tokens, and a smaller share of the drafts is kept: a later draft counts only if all
# before it were right, and the layer was trained to look one token ahead. The tokens are the same every time; in
# bfloat16, which rounds more, a step of several tokens may settle a tie of two tokens in another way.

# %%
runs = {0: ds.generate(model, prompts, max_new_tokens=NEW)}

# %%
runs[1] = ds.generate(model, prompts, max_new_tokens=NEW, draft=1)

# %%
runs[3] = ds.generate(model, prompts, max_new_tokens=NEW, draft=3)
for draft, run in runs.items():
    stats = run.stats
    per_step = (stats.new_tokens - stats.rows) / stats.steps
    kept = f"{stats.acceptance:4.0%} of drafts kept" if draft else ""
    print(f"{draft} drafts: {stats.steps:4} steps, {per_step:.2f} tokens a step  {kept}")
assert all(run.tokens == runs[0].tokens for run in runs.values())
inspect.plots.bars(
    {f"{draft} drafts": (run.stats.new_tokens - run.stats.rows) / run.stats.steps for draft, run in runs.items()},
    "new tokens a step",
    digits=2,
)

# %% [markdown]
# ## Along a text
#
# Slot i of the drafting layer knows the model's hidden vector of token i and the token i + 1, and drafts token i + 2.
# Over a text that the model has made, a draft is right where it equals the token that came.


# %%
@jax.jit
def drafts(model, hidden, following):
    batch, slots = following.shape
    position = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (batch, slots))
    h, _ = model.mtp(hidden, following, empty_layer(model.cfg, batch, slots, model.dtype), position)
    return model.mtp.logits(h).argmax(axis=-1)


whole = [n for n, made in enumerate(runs[0].tokens) if len(made) == NEW]
texts = np.array([prompts[n] + runs[0].tokens[n] for n in whole])
out = ds.forward(model, texts[:, :-2])
right = np.asarray(drafts(model, out.hidden, jnp.asarray(texts[:, 1:-1]))) == texts[:, 2:]
right = right[:, len(prompts[0]) - 2 :]
f"{right.mean():.0%} of single drafts are right in {right.size} places of {len(texts)} texts"

# %% [markdown]
# A text with every token whose draft was right in [brackets]: see how the drafts miss the beginnings of words that are
# new, and get whole lines right where the model repeats itself.

# %%
print("".join(f"[{part}]" if good else part for part, good in zip(
    (tokenizer.decode([token]) for token in texts[0, len(prompts[0]) :]), right[0], strict=True
)))  # fmt: skip

# %% [markdown]
# The share of right drafts in a window of 16 tokens, text by text: it comes in stretches, and rises to 100 % where a
# text begins to repeat itself, which greedy texts of a small model do.

# %%
window = np.ones(16) / 16
shares = {f"text {n}": 100 * np.convolve(row, window, "valid") for n, row in enumerate(right[:3])}
inspect.plots.lines(shares, "new token", "drafts right (%)")


# %% [markdown]
# ## By kind of token
#
# Which tokens are easy to draft, by their text alone: indentation, and least of all names and words.


# %%
def kind(text: str) -> str:
    word = text.strip()
    if not word:
        return "space, indent"
    if keyword.iskeyword(word):
        return "keyword"
    return "name, word" if word.isidentifier() else "punctuation"


kinds = np.array([[kind(tokenizer.decode([token])) for token in row[len(prompts[0]) :]] for row in texts])
inspect.plots.bars({name: 100 * right[kinds == name].mean() for name in np.unique(kinds)}, "drafts right (%)", digits=0)
