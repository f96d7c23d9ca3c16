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
# # Meshes
#
# **Which device holds which part of a model?** Eight virtual CPU devices stand for eight accelerators; program and
# placement are the same.
#
# *For the real checkpoint* set `SOURCE` to a DeepSeek-V3.2 folder in Hugging Face layout and leave out `XLA_FLAGS`. In
# NVFP4 it takes 411 GB on disk and over all devices; `dsv32 fit` says which mesh has room for it.
#
# *Fixed by rule:* nothing here is a sample; sizes are counted. *Chosen by hand, perhaps after looking:* the weights and
# meshes shown.
#
# The rule: each letter of a weight's name is an axis; E is split over the mesh axis "expert", H, F, M and V
# over "model", rows of a batch over "data".

# %%
import os
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np

import dsv32_jax as ds
from dsv32_jax import configs, convert, inspect
from dsv32_jax.checkpoint.weight_shapes import read_weight_shapes
from dsv32_jax.parallel.partition import parse_mesh

SOURCE = Path(ds.__file__).parent / "demo_checkpoint"
MESH = "expert=4,model=2"

target = Path(tempfile.mkdtemp()) / "converted"
convert.convert(SOURCE, target, to="nvfp4")
model = ds.load(target, mesh=ds.mesh(MESH))
model.mesh

# %% [markdown]
# ## One weight
#
# The experts of a layer are one array [E, M, D]. Each device holds some of the experts, and some rows of each:

# %%
placed = inspect.placement(model.cfg, "layers.3.ffn.w_gate_EMD", MESH)
placed

# %% [markdown]
# As a picture: the two split axes, and every shard with the devices that hold it.

# %%
inspect.plots.sharding(placed)

# %% [markdown]
# **Every device has an eighth: a quarter of the experts, and half the rows of each.** Colours only tell shards apart.
#
# The loaded array as JAX sees it. Two NVFP4 codes share a byte, so the last axis is half as long.

# %%
bank = model.layers[3].ffn.w_gate_EMD
for shard in bank.codes.addressable_shards:
    print(shard.device, shard.data.shape, shard.index)

# %% [markdown]
# Attention heads are split over "model" only, so four devices hold each shard. The indexer is replicated, because all
# devices must select the same tokens.

# %%
inspect.plots.sharding(inspect.placement(model.cfg, "layers.3.mla.w_uq_HNQ", MESH))

# %% [markdown]
# **Each half of the heads is on four devices.**
#
# ## Memory of each device
#
# Bytes of weights on each of the eight devices, split (sharded over some axis) and replicated:

# %%
megabytes = {str(device.id): {"replicated": 0.0, "split": 0.0} for device in jax.devices()}
for weight in jax.tree.leaves(model):
    for shard in weight.addressable_shards:
        kind = "replicated" if shard.data.shape == weight.shape else "split"
        megabytes[str(shard.device.id)][kind] += shard.data.nbytes / 1e6
inspect.plots.stacks(megabytes, "weights (MB)", "device")

# %% [markdown]
# **All devices hold the same, and what is replicated, mostly embeddings and the indexer, is small beside what is
# split.**
#
# And the weights of the real model on each device, in NVFP4 as NVIDIA publishes it, by kind, with the memory of an H100
# and an H200. This needs nothing but the configuration.

# %%
shapes = read_weight_shapes(configs.path("deepseek_v32"))
meshes = ("expert=4", "expert=8", "expert=4,model=2", "expert=16", "expert=32")


def kind_of(path: str) -> str:
    if path.startswith("mtp."):
        return "MTP head"
    kinds = {".mla.": "attention", ".indexer.": "attention", ".ffn.": "dense, shared"}
    found = next((kind for mark, kind in kinds.items() if mark in path), "embedding, head")
    return "experts" if shapes.table[path].stacked else found


gigabytes = {}
for mesh in meshes:
    parts = dict.fromkeys(("embedding, head", "attention", "dense, shared", "MTP head", "experts"), 0.0)
    for path, size in shapes.count_device_bytes(parse_mesh(mesh), "bfloat16").items():
        parts[kind_of(path)] += size / 1e9
    gigabytes[mesh.replace(",", "\n")] = parts
picture = inspect.plots.stacks(gigabytes, "weights on each device (GB)", "mesh")
for device, limit in {"H100": 80, "H200": 141}.items():
    picture.axes.axhline(limit, color="black", linestyle="--", linewidth=1)
    picture.axes.annotate(f"{device}, {limit} GB", (len(meshes) - 0.6, limit + 2), ha="right")
picture.axes.set_ylim(0, 155)
picture

# %% [markdown]
# **Experts are nearly everything, so splitting them helps most**, until attention, which only "model" splits, begins to
# show. A column below the line has room for caches; `dsv32 fit` counts these and the temporary memory of a step too.
#
# ## The same tokens
#
# A sharded model generates the tokens of a single device (in float32, where a different order of sums changes results
# by 1e-6).

# %%
prompts = [[0, 300, 301, 302], [0, 400, 401]]
generated = [
    ds.generate(ds.load(target, mesh=mesh, dtype=jnp.float32), prompts, max_new_tokens=8).tokens
    for mesh in (None, ds.mesh(MESH))
]
np.array_equal(*generated)
