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
# **How many drafts are accepted, and where in a text are they right?** The MTP head drafts the next tokens, the model
# verifies all of them in one step, and the result is token for token what the model would have generated alone.
#
# *For the real checkpoint* set `SOURCE` to a DeepSeek-V3.2 folder in Hugging Face layout and give `ds.load` a mesh, or
# `experts="host"`. In NVFP4 it takes 411 GB on disk, once more converted, and in memory; `dsv32 fit` says what else.
# The folder must include the MTP head.
#
# *Fixed by rule:* eight prompts, one every 1,000 tokens of the held-out file, and the numbers of drafts. *Chosen by
# hand, perhaps after looking:* that the first text is printed, the first three are drawn, and the window of 16 tokens.

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
# ## Acceptance
#
# The tokens are the same every time
# in float32; bfloat16 rounds more, so a step of several tokens may break a tie between two tokens differently.

# %%
runs = {0: ds.generate(model, prompts, max_new_tokens=NEW)}

# %%
runs[1] = ds.generate(model, prompts, max_new_tokens=NEW, draft=1)

# %%
runs[3] = ds.generate(model, prompts, max_new_tokens=NEW, draft=3)
for draft, run in runs.items():
    stats = run.stats
    per_step = stats.new_tokens / stats.steps
    accepted = f"{stats.acceptance:4.0%} of drafts accepted" if draft else ""
    print(f"draft={draft}: {stats.steps:4} steps, {per_step:.2f} tokens per step  {accepted}")
assert all(run.tokens == runs[0].tokens for run in runs.values())
inspect.plots.bars(
    {f"draft={draft}": run.stats.new_tokens / run.stats.steps for draft, run in runs.items()},
    "new tokens per step",
    digits=2,
)

# %% [markdown]
# **With more drafts a step generates more tokens, but a smaller share of the drafts is accepted**: a draft counts only
# if all drafts before it were right, and the layer was trained to look one token ahead.
#
# ## Along a text
#
# Slot i of the MTP head combines the model's hidden state of token i with token i + 1 and drafts token i + 2. In a
# text that the model has generated, a draft is right if it equals the actual token.


# %%
@jax.jit
def drafts(model, hidden, following):
    batch, slots = following.shape
    position = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (batch, slots))
    h, _ = model.mtp(hidden, following, empty_layer(model.cfg, batch, slots, model.dtype), position)
    return model.mtp.logits(h).argmax(axis=-1)


whole = [n for n, tokens in enumerate(runs[0].tokens) if len(tokens) == NEW]
texts = np.array([prompts[n] + runs[0].tokens[n] for n in whole])
out = ds.forward(model, texts[:, :-2])
right = np.asarray(drafts(model, out.hidden, jnp.asarray(texts[:, 1:-1]))) == texts[:, 2:]
right = right[:, len(prompts[0]) - 2 :]
f"{right.mean():.0%} of single drafts are right ({right.size} places in {len(texts)} texts)"

# %% [markdown]
# A text with correctly drafted tokens in [brackets]. Drafts miss the beginnings of new words, and get whole lines right
# where the model repeats itself.

# %%
print("".join(f"[{part}]" if good else part for part, good in zip(
    (tokenizer.decode([token]) for token in texts[0, len(prompts[0]) :]), right[0], strict=True
)))  # fmt: skip

# %% [markdown]
# The share of right drafts in a window of 16 tokens, for the first three texts:

# %%
window = np.ones(16) / 16
shares = {f"text {n}": 100 * np.convolve(row, window, "valid") for n, row in enumerate(right[:3])}
inspect.plots.lines(shares, "new token", "drafts right (%)")


# %% [markdown]
# **Right drafts come in stretches, and reach 100 % where a text begins to repeat itself**, as greedy texts of a small
# model do.
#
# ## By kind of token
#
# Which tokens are easy to draft?


# %%
def kind(text: str) -> str:
    word = text.strip()
    if not word:
        return "space, indent"
    if keyword.iskeyword(word):
        return "keyword"
    return "name, word" if word.isidentifier() else "punctuation"


kinds = np.array([[kind(tokenizer.decode([token])) for token in row[len(prompts[0]) :]] for row in texts])
shares = {f"{name}\n({(kinds == name).sum()} tokens)": 100 * right[kinds == name].mean() for name in np.unique(kinds)}
shares = dict(sorted(shares.items(), key=lambda item: -item[1]))
inspect.plots.bars(shares, "drafts right (%)", digits=0)

# %% [markdown]
# **Indentation is easy to draft; names and words are the hardest.**
