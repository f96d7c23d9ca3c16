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
# # Quickstart: convert, load, generate, stream
#
# **What does it take to run DeepSeek-V3.2 in JAX?** A folder of weights and the calls below. Everything here runs on a
# CPU in a minute, with the small bundled model: 13 million parameters in the real architecture, trained for nine
# minutes on Python's standard library.
#
# *For the real checkpoint* set `SOURCE` to a DeepSeek-V3.2 folder in Hugging Face layout and give `ds.load` a mesh, or
# `experts="host"`. In NVFP4 it takes 411 GB on disk, once more converted, and in memory; `dsv32 fit` says what else.

# %%
import tempfile
from pathlib import Path

import jax.numpy as jnp

import dsv32_jax as ds
from dsv32_jax import convert

SOURCE = Path(ds.__file__).parent / "demo_checkpoint"

scratch = Path(tempfile.mkdtemp())
sorted(file.name for file in Path(SOURCE).iterdir())

# %% [markdown]
# ## Convert
#
# The converter plans from the headers of the shards before it reads any weight, copies every code and scale byte for
# byte, and writes a manifest with a SHA-256 of each array. On the command line: `dsv32 convert SRC DST`.

# %%
manifest = convert.convert(SOURCE, scratch / "converted")
manifest.report["formats"], manifest.digest[:16]

# %% [markdown]
# ## Load
#
# The model is a plain pytree. The path of a parameter says what it is, the letters at its end name its axes.

# %%
model = ds.load(scratch / "converted")
w_o = model.layers[1].mla.w_o_DHP
type(w_o).__name__, w_o.shape, w_o.values.dtype, model.dtype

# %% [markdown]
# ## Generate
#
# Prompts are lists of token ids of any length; the tokenizer makes them from text. The first call compiles; the second,
# with the same shapes, does not.

# %%
tokenizer = ds.chat.Tokenizer.load(scratch / "converted", model.cfg)
signatures = [
    'def read_lines(path):\n    """Return the lines of a text file."""\n',
    'def is_empty(self):\n    """Whether there are no items in the queue."""\n',
]
prompts = [ds.chat.prepare(text, tokenizer).ids for text in signatures]
sampling = ds.Sampling(temperature=0.6, top_p=0.9, seed=2)
gen = ds.generate(model, prompts, max_new_tokens=32, sampling=sampling, tokenizer=tokenizer, stop="\ndef")
for signature, text in zip(signatures, gen.text, strict=True):
    print(signature + text + "\n")

# %%
again = ds.generate(model, prompts, max_new_tokens=32, sampling=ds.Sampling(temperature=1.0, seed=7))
again.stats.compiles, gen.finish_reason

# %% [markdown]
# ## Chat, and stream
#
# Messages are encoded in DeepSeek-V3.2's own format. Text is streamed as soon as it is final: whole characters only,
# and nothing that may still turn out to be part of a stop string.

# %%
prompt = ds.chat.prepare([{"role": "user", "content": "Hello"}], tokenizer)
print(prompt.text)
for event in ds.stream(model, prompt.ids, max_new_tokens=40, tokenizer=tokenizer):
    print(event.text, end="")

# %% [markdown]
# ## Draft
#
# The MTP head drafts tokens, and the model verifies them in one step: the same tokens in fewer steps.

# %%
plain = ds.generate(model, prompts, max_new_tokens=32)
drafted = ds.generate(model, prompts, max_new_tokens=32, draft=2)
print(
    f"{plain.stats.steps} steps, with drafts {drafted.stats.steps}; {drafted.stats.acceptance:.0%} of drafts accepted"
)
drafted.tokens == plain.tokens

# %% [markdown]
# ## Look inside
#
# On request, `forward` also returns what the layers computed: the experts of each token, the positions that the indexer
# selected. Notebooks 3 and 4 trace whole conversations.

# %%
out = ds.forward(model, [prompts[0]], capacity=64, seen=True)
print("logits", out.logits.shape, out.logits.dtype)
print("experts of each token in layer 2:", out.seen[2].routing.expert_BTX[0].tolist())
print("positions that the last token attends to in layer 2:", out.seen[2].selected_BTk[0, -1].tolist())

# %% [markdown]
# In float32, a prompt read token by token gives the logits of the whole prompt read at once.

# %%
exact = ds.load(scratch / "converted", dtype=jnp.float32)
whole = ds.forward(exact, [prompts[0]], capacity=64)
cache = ds.forward(exact, [prompts[0][:-1]], capacity=64).cache
last = ds.forward(exact, [prompts[0][-1:]], cache=cache)
float(jnp.abs(last.logits[0, -1] - whole.logits[0, -1]).max())
