"""A decode step that can be repeated: random weights, a cache of synthetic values, and the program of `generate`."""

import dataclasses
from collections.abc import Collection
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..checkpoint.load import place_on_host
from ..checkpoint.random_weights import leaf_maker, storage, uniform
from ..checkpoint.weight_shapes import WeightShapes, shape_weight
from ..config import Config
from ..generation.batch import SEGMENT_TOKENS
from ..generation.options import Sampling
from ..generation.prefill_decode import State, new_state, place, step
from ..generation.programs import WHOLE
from ..generation.sampler import make_params
from ..layout import leaves
from ..model.cache import Cache, LayerCache, empty_layer
from ..model.model import Model, build
from ..parallel.sharding import shard_rows

DTYPE = np.dtype(jnp.bfloat16)
"""The compute dtype."""


def make_model(cfg: Config, mesh: Mesh | None = None, host: Collection[str] = (), dtype: Any = DTYPE) -> Model:
    """Return a model with random NVFP4 weights, each device making its own part. Those of the paths `host` are made by
    all cores where they stay, in host memory, without a copy."""
    on_device, whole = leaf_maker(cfg, dtype, mesh=mesh), leaf_maker(cfg, dtype)
    table = {leaf.path: leaf for leaf in leaves(cfg)}

    def make(path: str) -> Any:
        if path not in host:
            return on_device(path)
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            weight = jax.tree.map(np.asarray, whole(path))
        return place_on_host(weight, table[path], mesh)

    return jax.block_until_ready(build(cfg, dtype, make, mesh=mesh))


@cache
def count_weight_bytes(cfg: Config, mesh: Mesh | None) -> dict[str, int]:
    """Return the bytes of every parameter of `make_model` on each device, by path."""
    table = {leaf.path: leaf for leaf in leaves(cfg)}
    weights = {path: shape_weight(leaf, storage(leaf, DTYPE)) for path, leaf in table.items()}
    return WeightShapes(cfg, table, weights, {}).count_device_bytes({} if mesh is None else dict(mesh.shape), DTYPE)


def fill_cache(
    cfg: Config, capacity: int, dtype: np.dtype, batch: int = 1, length: int | None = None, mesh: Mesh | None = None
) -> Cache:
    """Return a cache of random values of standard deviation 1, of `length` tokens a row (default: one slot is free)."""
    layers = tuple(_fill_layer(cfg, batch, capacity, dtype, mesh, np.uint32(i)) for i in range(cfg.num_hidden_layers))
    lengths = jnp.full(batch, capacity - 1 if length is None else length, jnp.int32)
    return jax.block_until_ready(Cache(layers, shard_rows(mesh, lengths)))


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _fill_layer(
    cfg: Config, batch: int, capacity: int, dtype: np.dtype, mesh: Mesh | None, seed: jax.Array
) -> LayerCache:
    sizes = (cfg.kv_lora_rank, cfg.qk_rope_head_dim, cfg.index_head_dim)
    new = [uniform((batch, capacity, size), DTYPE.name, seed * 3 + i, 0.0, 1.0) for i, size in enumerate(sizes)]
    slots = jnp.broadcast_to(jnp.arange(capacity), (batch, capacity))
    return shard_rows(mesh, empty_layer(cfg, batch, capacity, dtype).write(slots, *new))


class DecodeStep:
    """Decodes `steps` tokens a row, again and again in the same slots of `cache`, which is donated.

    `program` is that of another DecodeStep of the same shapes; by default it is compiled here.
    """

    def __init__(self, model: Model, cache: Cache, steps: int = 1, program: Any = None):
        self._model, self._steps = model, np.int32(steps)
        self._lengths = np.asarray(cache.length_B)
        batch, size = len(self._lengths), model.cfg.vocab_size
        params = make_params([Sampling()] * batch, size, size, max_new=2**31 - 1)
        self._params = shard_rows(model.mesh, params)
        tokens = np.random.default_rng(7).integers(0, size, batch, np.int32)
        tokens, done = place(model, (tokens, np.zeros(batch, bool)))
        self.state = dataclasses.replace(new_state(model, (cache, None), 0), token_B=tokens, done_B=done)
        self.program: Any = self._compile({}) if program is None else program

    def run(self) -> jax.Array:
        """Run the program once."""
        self.state, _ = self.program(self._model, self._params, self._rewind(), self._steps, np.int32(0))
        return self.state.new_B

    def compile_for_profile(self) -> Any:
        """Return the program without CUDA graphs, inside which a profile sees nothing."""
        if jax.default_backend() != "gpu":
            return self.program
        return self._compile({"xla_gpu_graph_min_graph_size": 1 << 20})

    def _rewind(self) -> State:
        cache = dataclasses.replace(self.state.cache, length_B=shard_rows(self._model.mesh, self._lengths))
        return dataclasses.replace(self.state, cache=cache)

    def _compile(self, options: dict[str, Any]) -> Any:
        arguments = (self._model, self._params, self._rewind(), self._steps, np.int32(0))
        return WHOLE.decode.lower(step, *arguments, SEGMENT_TOKENS, 0).compile(options or None)
