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
# Everything here runs on a CPU in seconds, on a small model with random weights: its tokens mean nothing, its path is
# that of the real one. Set `SOURCE` to a DeepSeek-V3.2 folder in Hugging Face layout to use other weights.

# %%
import tempfile
from pathlib import Path

import jax.numpy as jnp

import dsv32_jax as ds
from dsv32_jax import configs, convert, random_checkpoint

SOURCE = None

scratch = Path(tempfile.mkdtemp())
source = Path(SOURCE) if SOURCE else scratch / "hf"
if SOURCE is None:
    random_checkpoint.write(source, ds.Config.from_json(configs.path("tiny")))
sorted(file.name for file in source.iterdir())

# %% [markdown]
# ## Convert
#
# The converter plans from the names in the shards' headers before it reads a weight, keeps every code and scale byte,
# and writes a manifest with a digest of each array. The same is `python -m convert SRC DST` on the command line.

# %%
manifest = convert.convert(source, scratch / "converted")
manifest.report["formats"], manifest.digest[:16]

# %% [markdown]
# ## Load
#
# The model is a plain pytree: a leaf's path says what it is, its last letters say its axes.

# %%
model = ds.load(scratch / "converted")
w_o = model.layers[1].mla.w_o_DHP
type(w_o).__name__, w_o.shape, w_o.codes.dtype, w_o.block_scale.dtype, model.dtype

# %% [markdown]
# ## Generate
#
# Prompts are lists of token ids of any lengths. The first call compiles; the second, of the same shape, does not.

# %%
prompts = [[0, 17, 42, 7, 99], [0, 250]]
gen = ds.generate(model, prompts, max_new_tokens=8)
gen.tokens, gen.finish_reason

# %%
sampled = ds.generate(model, prompts, max_new_tokens=8, sampling=ds.Sampling(temperature=0.8, top_p=0.9, seed=7))
sampled.tokens, sampled.stats.compiles

# %% [markdown]
# ## Stream

# %%
[(event.token, round(event.logprob, 2)) for event in ds.stream(model, prompts[0], max_new_tokens=4)]

# %% [markdown]
# ## Look inside
#
# `forward` also returns what each layer saw: the experts of each token, the positions the indexer selected.

# %%
out = ds.forward(model, [prompts[0]], capacity=16)
print("logits", out.logits.shape, out.logits.dtype)
print("experts of each token in layer 1:", out.seen[1].routing.expert_BTX[0].tolist())
print("positions that the last token attends to in layer 1:", out.seen[1].selected_BTk[0, -1].tolist())

# %% [markdown]
# In float32 a token at a time gives what the whole prompt at once gives.

# %%
exact = ds.load(scratch / "converted", dtype=jnp.float32)
whole = ds.forward(exact, [prompts[0]], capacity=16)
cache = ds.forward(exact, [prompts[0][:4]], capacity=16).cache
last = ds.forward(exact, [prompts[0][4:]], cache=cache)
float(jnp.abs(last.logits[0, -1] - whole.logits[0, -1]).max())
