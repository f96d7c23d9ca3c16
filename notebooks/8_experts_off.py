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
# # Experts off
#
# **Does the model lose its docstrings if the experts that docstrings use are switched off, and only these?** Published
# work does this to ten of R1's 14,848 experts; here ten of the small bundled model's 48, on held-out text.
#
# *For the real checkpoint* set `SOURCE` to a DeepSeek-V3.2 folder in Hugging Face layout and give `ds.load` a mesh, or
# `experts="host"`; `dsv32 fit` says what that takes. There, ten experts are a thousandth of all rather than a fifth.

# %%
import re
import tempfile
from pathlib import Path

import numpy as np

import dsv32_jax as ds
from dsv32_jax import convert, inspect
from dsv32_jax.evaluation.loss import estimate_mean, exponentiate

DEMO = Path(ds.__file__).parent / "demo_checkpoint"
SOURCE = DEMO

target = Path(tempfile.mkdtemp()) / "converted"
convert.convert(SOURCE, target)
model = ds.load(target)
tokenizer = ds.chat.Tokenizer.load(target, model.cfg)
text = (DEMO / "heldout.txt").read_text(encoding="utf-8")

OFF, ROWS, TOKENS = 10, 24, 128
kinds = {
    "docstrings": "\n\n".join(re.findall(r'"""(.*?)"""', text, re.S)),
    "code": re.sub(r'"""(.*?)"""', "", text, flags=re.S),
}
rows = {}
for kind, part in kinds.items():
    ids = tokenizer.encode(part)
    rows[kind] = [ids[start : start + TOKENS] for start in range(0, 2 * ROWS * TOKENS, TOKENS)]

# %% [markdown]
# ## Which experts do docstrings use?
#
# The share of tokens that select an expert, in docstrings and in code, from the first half of each text. Rows are the
# sample, so that the error counts that tokens of one row depend on each other. Experts that differ most are first.

# %%
found = inspect.contrast(model, rows["docstrings"][:ROWS], rows["code"][:ROWS])
found

# %% [markdown]
# ## Switched off
#
# The ten experts that docstrings use most in excess of code, and as a control ten experts at random, five times. The
# perplexity is that of the second half of each text, which the ranking has not seen. An expert that is off is never
# selected; a token takes the next best instead.

# %%
ranked = [(int(one["layer"]), int(one["expert"])) for one in found.experts if one["difference"] > 0][:OFF]
every = [(int(one["layer"]), int(one["expert"])) for one in found.experts]
draws = [np.random.default_rng(seed).permutation(len(every))[:OFF] for seed in range(5)]
edits = {"docstring experts off": [ranked], "ten at random off": [[every[i] for i in draw] for draw in draws]}


def losses(model, kind: str) -> list[np.ndarray]:
    """The loss of every token of a kind of text, a row each."""
    return [-np.array(row) for row in ds.score(model, rows[kind][ROWS:]).logprobs]


before = {kind: losses(model, kind) for kind in rows}
change = {name: {} for name in edits}
for name, choices in edits.items():
    for kind in rows:
        after = [losses(inspect.edit(model, experts_off=off), kind) for off in choices]
        mean = [np.mean(one, axis=0) for one in zip(*after, strict=True)]
        difference = estimate_mean([a - b for a, b in zip(mean, before[kind], strict=True)])
        change[name][kind] = difference.mean, difference.standard_error
        old, new = (exponentiate(estimate_mean(one)) for one in (before[kind], mean))
        print(
            f"{name}, {kind}: perplexity {old.mean:.1f} ± {old.standard_error:.1f} became {new.mean:.1f} ± "
            f"{new.standard_error:.1f}; loss {difference.mean:+.3f} ± {difference.standard_error:.3f} nats"
        )
inspect.plots.groups(change, "kind of text", "change of loss (nats a token)")

# %% [markdown]
# **Docstrings lose 3.2 times as much as code if their experts are off; if ten at random are, 1.4 times.** Bars are one
# standard error of the paired difference over rows, at random of the mean of the five draws. Code is not spared: in a
# model of 48 experts the ten serve code too, and two fifths of its tokens use the most frequent one.
#
# ## What it writes
#
# The same beginnings of functions, greedily.

# %%
edited = inspect.edit(model, experts_off=ranked)
for name in ("read_lines(path)", "is_empty(self)", "close(self)"):
    prompt = ds.chat.prepare(f"def {name}:\n", tokenizer).ids
    for title, one in (("all experts", model), ("docstring experts off", edited)):
        gen = ds.generate(one, [prompt], max_new_tokens=28, tokenizer=tokenizer)
        print(f"{title:22}def {name}: {gen.text[0]!r}")
