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
# What lies where when a model is spread over devices. Eight virtual devices of the CPU stand for eight accelerators:
# the program and the placement are the same. Runs on the small model that is shipped; set `SOURCE` to a DeepSeek-V3.2
# folder in Hugging Face layout to use other weights. The rules: a letter of a weight's name is a mesh axis; E is
# "expert", H, F, M and V are "model", rows of a batch are "data".

# %%
import os
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np

import configs
import dsv32_jax as ds
from dsv32_jax import convert, inspect

SOURCE = Path(ds.__file__).parent / "demo_checkpoint"
MESH = "expert=4,model=2"

target = Path(tempfile.mkdtemp()) / "converted"
convert.convert(SOURCE, target, to="nvfp4")
model = ds.load(target, mesh=ds.mesh(MESH))
model.mesh

# %% [markdown]
# ## One weight
#
# The experts of a layer are one array [E, M, D]. Each device holds some experts, and of each of these some rows:

# %%
placed = inspect.placement(model.cfg, "layers.3.ffn.w_gate_EMD", MESH)
placed

# %% [markdown]
# The same as a picture: the two axes that are split, every piece with the device that holds it. Colours only part the
# pieces.

# %%
inspect.plots.sharding(placed)

# %% [markdown]
# What JAX says of the array that was loaded: the codes of NVFP4 are two to a byte, so their last axis is half as long.

# %%
bank = model.layers[3].ffn.w_gate_EMD
for shard in bank.codes.addressable_shards:
    print(shard.device, shard.data.shape, shard.index)

# %% [markdown]
# Attention's heads are split by "model" alone: every piece is on four devices, one for each part of the experts. The
# indexer is whole on every device, because all of them must select the same tokens.

# %%
inspect.plots.sharding(inspect.placement(model.cfg, "layers.3.mla.w_uq_HNQ", MESH))

# %% [markdown]
# ## Memory of each device
#
# Bytes of weights that lie on each of the eight devices: they are equal.

# %%
nbytes = {device.id: 0 for device in jax.devices()}
for leaf in jax.tree.leaves(model):
    for shard in leaf.addressable_shards:
        nbytes[shard.device.id] += shard.data.nbytes
inspect.plots.bars({str(device): size / 1e6 for device, size in nbytes.items()}, "weights (MB)", xlabel="device")

# %% [markdown]
# And for the real model, by what the parameters are for, in billions a device: nothing but the configuration is needed.
# See how experts are nearly everything: to split them is what helps, until attention, which only "model" splits, begins
# to show. `dsv32 fit` counts bytes, caches and what a step needs.

# %%
real = ds.Config.from_json(configs.path("deepseek_v32"))
meshes = ("expert=8", "expert=4,model=2", "expert=16", "expert=8,model=2", "expert=32")
held = {mesh: {what: n / 1e9 for what, n in inspect.parameters_per_device(real, mesh).items()} for mesh in meshes}
names = {mesh: mesh.replace(",", "\n") for mesh in meshes}
inspect.plots.stacks({names[mesh]: parts for mesh, parts in held.items()}, "parameters a device (billions)")

# %% [markdown]
# ## The same tokens
#
# A model on a mesh makes the tokens that it makes alone (in float32, where sums in another order differ by 1e-6).

# %%
prompts = [[0, 300, 301, 302], [0, 400, 401]]
made = [
    ds.generate(ds.load(target, mesh=mesh, dtype=jnp.float32), prompts, max_new_tokens=8).tokens
    for mesh in (None, ds.mesh(MESH))
]
np.array_equal(made[0], made[1])
