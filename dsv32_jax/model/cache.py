"""The KV cache: one latent, one rotated key and one index key a token and layer."""

import dataclasses
import math
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from ..config import Config
from ..errors import UsageError, argument, pluralize
from ..parallel.sharding import map_rows
from ..quantization import cache_formats
from ..quantization.cache_formats import Rows
from ..system.progress import format_size
from ..system.summary import Summarized
from .summary import describe_devices, nbytes

DTYPES = {np.dtype(dtype).name: dtype for dtype in (jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class LayerCache(Summarized):
    """The cache of a layer: pages of slots, and the pages of each row. A slot holds one token.

    c_kv_yqC     the latent c^KV of MLA, after its norm
    k_r_yqR      the rotated part of the key (interleaved pairs), shared by all heads
    k_index_yqJ  the indexer's key, normed, rotated and Hadamard-transformed
    table_Bd     the pages of each row in the order of its positions, -1 for none; without a table row b has page b
                 alone. Where a mesh splits the rows, so are the pages, and entries count from the shard's first page

    In an FP8 cache latents and index keys are FP8, rotated keys bfloat16: 656 + 132 bytes a token in the real model.
    """

    c_kv_yqC: Rows
    k_r_yqR: Rows
    k_index_yqJ: Rows
    table_Bd: jax.Array | None = None

    @property
    def capacity(self) -> int:
        """The number of positions of a row."""
        return self.k_r_yqR.shape[1] * (1 if self.table_Bd is None else self.table_Bd.shape[1])

    def with_table(self, table_Bd: jax.Array | None) -> Self:
        """Return the same pages with this table."""
        return dataclasses.replace(self, table_Bd=table_Bd)

    def slots(self, position: jax.Array) -> jax.Array:
        """Return where positions [B, ...] of each row are among the slots of all pages, -1 where they are nowhere."""
        pages, size = self.k_r_yqR.shape[:2]
        table_Bd = jnp.arange(pages, dtype=jnp.int32)[:, None] if self.table_Bd is None else self.table_Bd
        block = position.reshape(len(table_Bd), -1) // size
        inside = (block >= 0) & (block < table_Bd.shape[1])
        page = jnp.take_along_axis(table_Bd, jnp.where(inside, block, 0), axis=1)
        page = jnp.where(inside, page, -1).reshape(position.shape)
        return jnp.where(page >= 0, page * size + position % size, -1)

    def write(self, position_BT: jax.Array, c_kv_BTC: jax.Array, k_r_BTR: jax.Array, k_index_BTJ: jax.Array) -> Self:
        """Return the cache with these tokens. A position without a slot is dropped."""
        return map_rows(_write)(self, position_BT, c_kv_BTC, k_r_BTR, k_index_BTJ)

    def visible(self, position_BT: jax.Array) -> jax.Array:
        """Return the mask [B, T, S] of positions that a query at this one sees: its own and those before it."""
        return jnp.arange(self.capacity) <= position_BT[..., None]

    def latents(self, dtype) -> tuple[jax.Array, jax.Array]:
        """Return c^KV [B, S, C] and k^R [B, S, R] of every position."""

        def read(cache: LayerCache) -> tuple[jax.Array, jax.Array]:
            capacity = cache.capacity
            return cache.read(cache.c_kv_yqC, 0, capacity, dtype), cache.read(cache.k_r_yqR, 0, capacity, dtype)

        return map_rows(read)(self)

    def read(self, rows: Rows, start: int | jax.Array, count: int, dtype) -> jax.Array:
        """Return `count` vectors of each row from position `start` on, [B, count, n]. Both are multiples of runs that
        stand together in a page, and are read so."""
        pages, page = rows.shape[:2]
        batch, run = pages if self.table_Bd is None else len(self.table_Bd), math.gcd(page, count)
        position = jnp.broadcast_to(start + jnp.arange(0, count, run), (batch, count // run))
        at = jnp.maximum(self.slots(position), 0) // run
        found = jax.tree.map(lambda x: x.reshape(-1, run, x.shape[-1])[at].reshape(batch, count, -1), rows)
        return cache_formats.read(found, dtype)


def _write(
    cache: LayerCache, position_BT: jax.Array, c_kv_BTC: jax.Array, k_r_BTR: jax.Array, k_index_BTJ: jax.Array
) -> LayerCache:
    slot_BT = cache.slots(position_BT)

    def put(rows: Rows, new: jax.Array) -> Rows:
        def scatter(into: jax.Array, new: jax.Array) -> jax.Array:
            slots = into.reshape(-1, into.shape[-1])
            return slots.at[slot_BT].set(new, mode="drop", wrap_negative_indices=False).reshape(into.shape)

        return jax.tree.map(scatter, rows, cache_formats.encode_like(rows, new))

    return dataclasses.replace(
        cache,
        c_kv_yqC=put(cache.c_kv_yqC, c_kv_BTC),
        k_r_yqR=put(cache.k_r_yqR, k_r_BTR),
        k_index_yqJ=put(cache.k_index_yqJ, k_index_BTJ),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Cache(Summarized):
    """The caches of all layers, and the tokens in each row: the next one has the position length_B[b].

    `table_Bd` has the pages of each row in every layer; the layers themselves have no table.
    """

    layers: tuple[LayerCache, ...]
    length_B: jax.Array
    table_Bd: jax.Array | None = None

    @property
    def capacity(self) -> int:
        """The number of tokens a row can hold."""
        return self.layers[0].with_table(self.table_Bd).capacity

    def summary(self) -> tuple[str, dict[str, str]]:
        """Return rows and slots, the storage of latents, and the size."""
        arrays = jax.tree.leaves(self.layers)
        return f"Cache: {pluralize(len(self.length_B), 'row')} x {pluralize(self.capacity, 'slot')}", {
            "layers": f"{len(self.layers)}, {self.layers[0].c_kv_yqC.dtype}, {format_size(sum(map(nbytes, arrays)))}",
            "devices": describe_devices(arrays),
        }


def empty_layer(cfg: Config, batch: int, capacity: int, dtype) -> LayerCache:
    """Return a cache of a layer with empty slots."""
    rotated = jnp.bfloat16 if dtype == jnp.float8_e4m3fn else dtype
    return LayerCache(
        cache_formats.empty((batch, capacity, cfg.kv_lora_rank), dtype),
        cache_formats.empty((batch, capacity, cfg.qk_rope_head_dim), rotated),
        cache_formats.empty((batch, capacity, cfg.index_head_dim), dtype),
    )


def empty(cfg: Config, batch: int, capacity: int, dtype) -> Cache:
    """Return a cache for `batch` rows of at most `capacity` tokens, in bfloat16, float32 or float8_e4m3fn."""
    layers = tuple(empty_layer(cfg, batch, capacity, dtype) for _ in range(cfg.num_hidden_layers))
    return Cache(layers, jnp.zeros(batch, jnp.int32))


def dtype_of(cache_dtype, compute_dtype) -> np.dtype:
    """Return the dtype of a cache: `cache_dtype` is a dtype or its name, "fp8", or None for the compute dtype."""
    if cache_dtype is None:
        return np.dtype(compute_dtype)
    try:
        found = np.dtype(DTYPES["float8_e4m3fn"] if cache_dtype == "fp8" else DTYPES.get(cache_dtype, cache_dtype))
    except TypeError:
        found = None
    if found is None or found.name not in DTYPES:
        name = argument("cache_dtype")
        raise UsageError(f'{name} must be bfloat16, float32 or "fp8" (float8_e4m3fn), not {cache_dtype!r}')
    return found
