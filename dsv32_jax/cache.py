"""What attention keeps of the tokens it has seen: one latent, one rotated key and one index key a token and layer."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from .config import Config


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """The cache of one layer, S slots a row; slot s holds the token at position s.

    c_kv_BSC     the latent c^KV of MLA, after its norm
    k_r_BSR      the key part that carries the position, rotated (interleaved pairs), shared by all heads
    k_index_BSJ  the lightning indexer's key: normed, rotated and Hadamard-transformed
    """

    c_kv_BSC: jax.Array
    k_r_BSR: jax.Array
    k_index_BSJ: jax.Array

    @property
    def capacity(self) -> int:
        """The number of slots."""
        return self.c_kv_BSC.shape[1]

    def write(self, position_BT: jax.Array, c_kv_BTC: jax.Array, k_r_BTR: jax.Array, k_index_BTJ: jax.Array) -> Self:
        """A cache that also holds these tokens. A position beyond the capacity is dropped."""
        row_B1 = jnp.arange(position_BT.shape[0])[:, None]

        def put(slots, new):
            return slots.at[row_B1, position_BT].set(new.astype(slots.dtype), mode="drop")

        return dataclasses.replace(
            self,
            c_kv_BSC=put(self.c_kv_BSC, c_kv_BTC),
            k_r_BSR=put(self.k_r_BSR, k_r_BTR),
            k_index_BSJ=put(self.k_index_BSJ, k_index_BTJ),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The caches of all layers, and how many tokens each row has: its next token goes to position length_B[b]."""

    layers: tuple[LayerCache, ...]
    length_B: jax.Array

    @property
    def capacity(self) -> int:
        """How many tokens a row can hold."""
        return self.layers[0].capacity


def empty_layer(cfg: Config, batch: int, capacity: int, dtype) -> LayerCache:
    """A layer's cache with nothing in it."""
    sizes = (cfg.kv_lora_rank, cfg.qk_rope_head_dim, cfg.index_head_dim)
    return LayerCache(*(jnp.zeros((batch, capacity, size), dtype) for size in sizes))


def empty(cfg: Config, batch: int, capacity: int, dtype) -> Cache:
    """A cache for `batch` rows of at most `capacity` tokens, in the compute dtype."""
    layers = tuple(empty_layer(cfg, batch, capacity, dtype) for _ in range(cfg.num_hidden_layers))
    return Cache(layers, jnp.zeros(batch, jnp.int32))
