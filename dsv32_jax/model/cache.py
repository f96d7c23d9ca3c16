"""The KV cache: one latent, one rotated key and one index key a token and layer."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from ..config import Config
from ..errors import UsageError, argument, pluralize
from ..quantization import cache_formats
from ..quantization.cache_formats import Rows
from ..system.progress import format_size
from .summary import Summarized, describe_devices, nbytes

DTYPES = {np.dtype(dtype).name: dtype for dtype in (jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class LayerCache(Summarized):
    """The cache of a layer, S slots a row. Slot s holds the token at position s.

    c_kv_BSC     the latent c^KV of MLA, after its norm
    k_r_BSR      the rotated part of the key (interleaved pairs), shared by all heads
    k_index_BSJ  the indexer's key, normed, rotated and Hadamard-transformed

    In an FP8 cache latents and index keys are FP8, rotated keys bfloat16: 656 + 132 bytes a token in the real model.
    """

    c_kv_BSC: Rows
    k_r_BSR: Rows
    k_index_BSJ: Rows

    @property
    def capacity(self) -> int:
        """The number of slots."""
        return self.k_r_BSR.shape[1]

    def resize(self, capacity: int) -> Self:
        """Return the first `capacity` slots, padded with empty ones."""
        more = (0, capacity - self.capacity, 0)
        return jax.tree.map(lambda x: jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), more, (0, 0, 0)]), self)

    def write(self, position_BT: jax.Array, c_kv_BTC: jax.Array, k_r_BTR: jax.Array, k_index_BTJ: jax.Array) -> Self:
        """Return the cache with these tokens. A position beyond the capacity is dropped."""

        def write_rows(slots: Rows, new: jax.Array) -> Rows:
            one_row = jax.vmap(lambda slots, at, new: slots.at[at].set(new, mode="drop"))
            return jax.tree.map(lambda a, b: one_row(a, position_BT, b), slots, cache_formats.encode_like(slots, new))

        return dataclasses.replace(
            self,
            c_kv_BSC=write_rows(self.c_kv_BSC, c_kv_BTC),
            k_r_BSR=write_rows(self.k_r_BSR, k_r_BTR),
            k_index_BSJ=write_rows(self.k_index_BSJ, k_index_BTJ),
        )

    def visible(self, position_BT: jax.Array) -> jax.Array:
        """Return the mask [B, T, S] of slots that a query at this position sees: its own and those before it."""
        return jnp.arange(self.capacity) <= position_BT[..., None]

    def latents(self, dtype) -> tuple[jax.Array, jax.Array]:
        """Return c^KV [B, S, C] and k^R [B, S, R] of every slot."""
        return cache_formats.read(self.c_kv_BSC, dtype), cache_formats.read(self.k_r_BSR, dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Cache(Summarized):
    """The caches of all layers, and the tokens in each row: the next one has the position length_B[b]."""

    layers: tuple[LayerCache, ...]
    length_B: jax.Array

    @property
    def capacity(self) -> int:
        """The number of tokens a row can hold."""
        return self.layers[0].capacity

    def summary(self) -> tuple[str, dict[str, str]]:
        """Return rows and slots, the storage of latents, and the size."""
        arrays = jax.tree.leaves(self.layers)
        return f"Cache: {pluralize(len(self.length_B), 'row')} x {pluralize(self.capacity, 'slot')}", {
            "layers": f"{len(self.layers)}, {self.layers[0].c_kv_BSC.dtype}, {format_size(sum(map(nbytes, arrays)))}",
            "devices": describe_devices(arrays),
        }

    def resize(self, capacity: int) -> Self:
        """Return the first `capacity` slots of each row, padded with empty ones."""
        return dataclasses.replace(self, layers=tuple(layer.resize(capacity) for layer in self.layers))


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
