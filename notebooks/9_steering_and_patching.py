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
# # Steering and patching
#
# **Is there a direction in the residual stream that means "docstring", and where in the network is an answer decided?**
# The first is asked by adding the direction, the second by putting parts of one run into another.
#
# *For the real checkpoint* set `SOURCE` to a DeepSeek-V3.2 folder in Hugging Face layout and give `ds.load` a mesh, or
# `experts="host"`. In NVFP4 it takes 411 GB on disk, once more converted, and in memory; `dsv32 fit` says what else.
# A patch is a prefill for each layer and position: choose `layers`.
#
# *Fixed by rule:* the texts of the direction, the first 4,096 tokens of each kind; the first 32 functions. *Chosen by
# hand, perhaps after looking:* layer 3, the seed, the characters that count as code, and the two prompts, a pair whose
# answers differ: one example of one layer each, which others need not follow. The functions are from the text of the
# direction.

# %%
import re
import tempfile
from pathlib import Path

import numpy as np

import dsv32_jax as ds
from dsv32_jax import convert, inspect

DEMO = Path(ds.__file__).parent / "demo_checkpoint"
SOURCE = DEMO

target = Path(tempfile.mkdtemp()) / "converted"
convert.convert(SOURCE, target)
model = ds.load(target)
tokenizer = ds.chat.Tokenizer.load(target, model.cfg)
text = (DEMO / "heldout.txt").read_text(encoding="utf-8")

LAYER = 3

# %% [markdown]
# ## A direction
#
# The difference of mean residual streams, docstrings less code, after each layer. The error is the norm that two sets
# of the same kind would show.

# %%
texts = "\n\n".join(re.findall(r'"""(.*?)"""', text, re.S)), re.sub(r'"""(.*?)"""', "", text, flags=re.S)
sets = [[ids[start : start + 128] for start in range(0, 4096, 128)] for ids in map(tokenizer.encode, texts)]
found = inspect.contrast(model, *sets)
for one in np.sort(found.directions, order="layer"):
    print(f"after layer {one['layer']}: norm {one['norm']:5.2f} ± {one['standard_error']:.2f}")

# %% [markdown]
# ## Steering
#
# The direction is added after layer 3, several times or with the opposite sign, while the model continues the first
# lines of functions. Of its 40 tokens, which share of the characters is punctuation that code has and prose has not?

# %%
names = list(dict.fromkeys(re.findall(r"^def (\w+\([^()\n]*\)):$", text, re.M)))[:32]
prompts = [ds.chat.prepare(f"def {name}:\n", tokenizer).ids for name in names]
scales = (-2, -1, 0, 1, 2)
sampling = ds.Sampling(temperature=0.7, seed=1)
shares = []
for scale in scales:
    steered = inspect.edit(model, add={LAYER: found.direction[LAYER]}, scale=scale)
    gen = ds.generate(steered, prompts, max_new_tokens=40, sampling=sampling, tokenizer=tokenizer)
    shares.append([100 * np.mean([char in "()[]{}=_.:+*/" for char in one]) for one in gen.text])
    print(f"{scale:+d}: def {names[0]}: {gen.text[0]!r}")
mean, error = np.mean(shares, axis=1), np.std(shares, axis=1, ddof=1) / np.sqrt(len(prompts))
inspect.plots.lines(
    {"mean of 32 functions": mean},
    "times the direction is added",
    "code punctuation (%)",
    scales,
    {"mean of 32 functions": error},
)

# %% [markdown]
# **The direction means what it is called: each step against it writes more code, each step along it more prose**, from
# 16 % of punctuation to 2 %, with 5 % unsteered. Text gets worse on the way: twice the direction is far from any stream
# that training has seen.
#
# ## Patching
#
# Two prompts that differ in one token, the name of a method. After the first the model continues `self` with `.close`.
# The residual stream of the first run is put into the second, after one layer and at one position at a time: where
# does it bring the answer back?

# %%
clean, corrupted = (tokenizer.encode(f"class A:\n    def {name}(self):\n        self") for name in ("close", "write"))
answer = tokenizer.encode("self.close")[-1]
patching = inspect.patch(model, clean, corrupted, answer)
patching

# %%
inspect.plots.patching(patching, [tokenizer.decode([token]) for token in clean])

# %% [markdown]
# **The name stays at its own position up to layer 2, begins to move in layer 3, and layer 4 brings it to the last
# token, where the answer is read.** Between the two hardly any patch matters: attention fetches
# the name directly. Positions before the name are the same in both runs.
