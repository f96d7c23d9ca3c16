"""The lightning indexer of DeepSeek sparse attention (DeepSeek-V3.2, section 2.1).

For a query t and a cached token s the index score is

    I[t, s] = sum over heads i of  w[t, i] * relu(q[t, i] . k[s])

and attention is restricted to the index_topk tokens with the largest scores. All heads share one key a token.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..config import Config
from ..kernels import dispatch, reference
from ..parallel.sharding import map_rows
from ..quantization.formats import Weight
from .cache import LayerCache
from .ops import einsum32, hadamard, layer_norm, rotate_halves
from .summary import Module

LAYER_NORM_EPS = 1e-6

KEYS = 4096
"""Positions of a long cache that XLA scores at once."""


@dataclasses.dataclass(eq=False, repr=False)
class Indexer(Module):
    """The matrices of index queries, keys and head weights."""

    cfg: Config
    w_q_IJQ: Weight = nnx.data()
    w_k_JD: Weight = nnx.data()
    k_norm_J: jax.Array = nnx.data()
    k_bias_J: jax.Array = nnx.data()
    w_w_ID: Weight = nnx.data()

    def restrict(self, value_BTS: jax.Array, position_BT: jax.Array, hidden: Any) -> jax.Array:
        """Return values of all positions with `hidden` where a query may not select: here nowhere beyond causality."""
        return value_BTS

    @jax.named_scope("index projections")
    def keys(self, h_BTD: jax.Array, cos_BTr: jax.Array, sin_BTr: jax.Array) -> jax.Array:
        """Return the keys [B, T, J] as they are cached: normed, rotated and Hadamard-transformed."""
        k_BTJ = layer_norm(einsum32("BTD,JD->BTJ", h_BTD, self.w_k_JD), self.k_norm_J, self.k_bias_J, LAYER_NORM_EPS)
        return hadamard(rotate_halves(k_BTJ, cos_BTr, sin_BTr)).astype(h_BTD.dtype)

    @jax.named_scope("index projections")
    def queries(self, c_q_BTQ: jax.Array, cos_BTr: jax.Array, sin_BTr: jax.Array) -> jax.Array:
        """Return the queries [B, T, I, J], rotated and Hadamard-transformed."""
        q_BTIJ = einsum32("BTQ,IJQ->BTIJ", c_q_BTQ, self.w_q_IJQ)
        return hadamard(rotate_halves(q_BTIJ, cos_BTr[:, :, None], sin_BTr[:, :, None])).astype(c_q_BTQ.dtype)

    @jax.named_scope("index projections")
    def head_weights(self, h_BTD: jax.Array) -> jax.Array:
        """Return the head weights [B, T, I], float32 throughout, with both scales, I^-1/2 and J^-1/2."""
        scale = (self.cfg.index_n_heads * self.cfg.index_head_dim) ** -0.5
        return einsum32("BTD,ID->BTI", h_BTD.astype(jnp.float32), self.w_w_ID) * scale


def index_scores(q_BTIJ: jax.Array, w_BTI: jax.Array, k_BSJ: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    """Return I [B, T, S] in float32, -inf where a token is not visible to the query."""
    return jnp.where(visible_BTS, dispatch.index_scores(q_BTIJ, w_BTI, k_BSJ), -jnp.inf)


@jax.named_scope("index scores")
def score_slots(q_BTIJ: jax.Array, w_BTI: jax.Array, cache: LayerCache, position_BT: jax.Array) -> jax.Array:
    """Return `index_scores` [B, T, S] over all positions of the cache for queries at `position_BT`."""
    kernels = dispatch.find_sparse_attention(q_BTIJ.dtype, (cache.k_index_yqJ,), q_BTIJ.shape[-2:])
    score = score_rows
    if kernels:
        score = dispatch.differentiable(
            score, {"cuda": lambda q, w, cache, at: kernels.index_scores(q, w, cache.k_index_yqJ, cache.table_Bd, at)}
        )
    return map_rows(score)(q_BTIJ, w_BTI, cache, position_BT)


def score_rows(q_BTIJ: jax.Array, w_BTI: jax.Array, cache: LayerCache, position_BT: jax.Array) -> jax.Array:
    """Return the index scores of these rows, KEYS positions at a time and not beyond the latest query."""
    capacity = cache.capacity
    keys = min(capacity, KEYS)

    def part(start):
        position_s = start + jnp.arange(keys)
        k_BsJ = cache.read(cache.k_index_yqJ, start, keys, q_BTIJ.dtype)
        return index_scores(q_BTIJ, w_BTI, k_BsJ, position_s <= position_BT[..., None])

    if keys == capacity:
        return part(0)

    def fill(i, score_BTS):
        start = jnp.minimum(i * keys, capacity - keys)
        return jax.lax.dynamic_update_slice_in_dim(score_BTS, part(start), start, axis=2)

    empty_BTS = jnp.full((*position_BT.shape, capacity), -jnp.inf, jnp.float32)
    reached = jnp.minimum(jnp.max(position_BT) // keys + 1, -(-capacity // keys))
    return jax.lax.fori_loop(0, reached, fill, empty_BTS)


@jax.named_scope("top-k")
def select_from_cache(score_BTS: jax.Array, position_BT: jax.Array, topk: int) -> jax.Array:
    """Return the positions of the `topk` largest scores of each query, -1 where a query sees fewer."""
    kernels = {name: partial(kernel, topk=topk) for name, kernel in dispatch.find_selection().items()}
    select = partial(jax.lax.platform_dependent, **kernels, default=partial(select_few_or_topk, topk=topk))
    return map_rows(select)(jax.lax.stop_gradient(score_BTS), position_BT)


def select_few_or_topk(score_BTS: jax.Array, position_BT: jax.Array, topk: int) -> jax.Array:
    """Return `select_topk`, or all that a query sees, without sorting, while none sees more than `topk` positions."""
    seen_BTk = score_BTS[..., :topk] != -jnp.inf
    few = jnp.max(position_BT) < topk
    return jax.lax.cond(few, lambda: select_all(seen_BTk), lambda: reference.select_topk(score_BTS, topk))


def select_all(visible_BTS: jax.Array) -> jax.Array:
    """Return every visible position, and -1 for the others: the selection of a cache of at most index_topk slots."""
    return jnp.where(visible_BTS, jnp.arange(visible_BTS.shape[-1]), -1)
