"""The values of a trace, computed from what the layers of a chunk saw."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..model import mla
from ..model.attention import MAX_TEMPORARY, max_queries
from ..model.block import Block, Seen
from ..model.cache import Cache, LayerCache
from ..model.model import Model
from ..model.moe import MoE
from ..model.ops import map_tokens, rms_norm, rotation
from .trace_format import KINDS, LENS, TOP

Values = dict[str, jax.Array]
"""Arrays of a trace for one chunk of one layer, [B, T, ...]."""


class Keep(NamedTuple):
    """The kinds of arrays that are kept, and the layers whose residual stream is, in order."""

    kinds: tuple[str, ...]
    layers: tuple[int, ...] = ()


def observe(
    keep: Keep, model: Model, cache: Cache, tokens_BT: jax.Array, next_BT: jax.Array, count_B: jax.Array
) -> tuple[Cache, tuple[list[Values], Values]]:
    """Prefill a chunk and return the new cache, and the values of each layer and of the head, [B, T, ...]."""
    position_BT = cache.length_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    x_BTD, filled, seen = model.observe(tokens_BT, cache, count_B)
    layers = [
        _observe_layer(keep.kinds, layer, layer_seen, layer_cache, position_BT)
        for layer, layer_seen, layer_cache in zip(model.layers, seen, filled.layers, strict=True)
    ]
    for i, y_BTD in enumerate(after_each_layer(seen, x_BTD)):
        if "residual" in keep.kinds and i in keep.layers:
            layers[i]["residual"] = y_BTD
        if "lens" in keep.kinds:
            layers[i] |= zip(KINDS["lens"], predict(model, y_BTD, LENS), strict=True)
    head = dict(zip(KINDS["logits"], predict(model, x_BTD, TOP), strict=True)) if "logits" in keep.kinds else {}
    return filled, (layers, head)


observe_jit = jax.jit(observe, static_argnames="keep", donate_argnames="cache")


def after_each_layer(seen: tuple[Seen, ...], x_BTD: jax.Array) -> list[jax.Array]:
    """Return the residual stream after each layer; x_BTD is that after the last one."""
    return [*(layer.x_BTD for layer in seen[1:]), x_BTD]


def _observe_layer(
    kinds: tuple[str, ...], layer: Block, seen: Seen, cache: LayerCache, position_BT: jax.Array
) -> Values:
    found: Values = {}
    if "routing" in kinds and seen.routing is not None:
        found |= {"expert": seen.routing.expert_BTX, "gate": seen.routing.gate_BTX}
    if "experts" in kinds and seen.routing is not None:
        found |= {"expert": seen.routing.expert_BTX, "norm": output_norms(layer, seen)}
    if "indexer" in kinds:
        score_BTk = jnp.take_along_axis(seen.index_score_BTS, jnp.maximum(seen.selected_BTk, 0), axis=-1)
        score_BTk = jnp.where(seen.selected_BTk >= 0, score_BTk, -jnp.inf)
        found |= {"selected": seen.selected_BTk, "index_score": score_BTk}
    if "attention" in kinds:
        weight_BTk, spread_BT = attention_weights(layer, seen, cache, position_BT)
        found |= {"selected": seen.selected_BTk, "weight": weight_BTk, "spread": spread_BT}
    if "mass" in kinds:
        found |= zip(KINDS["mass"], mass_shares(layer, seen, cache, position_BT), strict=True)
    return found


def attention_weights(
    layer: Block, seen: Seen, cache: LayerCache, position_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the weight of each selected position, mean over heads [B, T, k], and the entropy of the weights in nats,
    mean over heads [B, T].

    Uses the products of attention itself, so that XLA computes them once.
    """

    def of(q_c_BTHN, q_r_BTHR, selected_BTk, position_BT):
        if cache.capacity <= layer.cfg.index_topk:
            visible_BTS = layer.indexer.restrict(cache.visible(position_BT), position_BT, False)
            weight_BTHk, _ = mla.absorbed_weights(layer.mla, q_c_BTHN, q_r_BTHR, cache, visible_BTS)
        else:
            weight_BTHk, _ = mla.sparse_weights(layer.mla, q_c_BTHN, q_r_BTHR, cache, selected_BTk)
        return weight_BTHk.mean(axis=2), jax.scipy.special.entr(weight_BTHk).sum(axis=-1).mean(axis=2)

    block = max_queries(layer.cfg, len(position_BT), cache.capacity)
    return map_tokens(of, _queries(layer, seen, position_BT), block)


def mass_shares(
    layer: Block, seen: Seen, cache: LayerCache, position_BT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the shares [B, T] of dense attention's weight that the arrays of the kind "mass" hold."""

    def of(q_c_BTHN, q_r_BTHR, selected_BTk, position_BT):
        slot_S = jnp.arange(cache.capacity)
        visible_BTS = cache.visible(position_BT)
        weight_BTHS, _ = mla.absorbed_weights(layer.mla, q_c_BTHN, q_r_BTHR, cache, visible_BTS)
        weight_BTS = weight_BTHS.mean(axis=2)
        selected_weight_BTk = jnp.take_along_axis(weight_BTS, jnp.maximum(selected_BTk, 0), axis=-1)
        selected_BT = jnp.where(selected_BTk >= 0, selected_weight_BTk, 0).sum(axis=-1)
        best_BT = jax.lax.top_k(weight_BTS, selected_BTk.shape[-1])[0].sum(axis=-1)
        recent_BTS = visible_BTS & (slot_S > position_BT[..., None] - selected_BTk.shape[-1])
        return selected_BT, best_BT, jnp.where(recent_BTS, weight_BTS, 0).sum(axis=-1)

    block = max_queries(layer.cfg, len(position_BT), cache.capacity)
    block = max(1, block // max(1, cache.capacity // layer.cfg.index_topk))
    return map_tokens(of, _queries(layer, seen, position_BT), block)


def _queries(layer: Block, seen: Seen, position_BT: jax.Array) -> tuple[jax.Array, ...]:
    """Return the queries [B, T, H, N] and [B, T, H, R] of the layer's input, the selected positions and its own."""
    h_BTD = rms_norm(seen.x_BTD, layer.attn_norm_D, layer.cfg.rms_norm_eps).astype(layer.dtype)
    queries = layer.mla.queries(layer.mla.latent_query(h_BTD), *rotation(position_BT, layer.cfg))
    return *queries, seen.selected_BTk, position_BT


def output_norms(layer: Block, seen: Seen) -> jax.Array:
    """Return the norm of the output of each of a token's experts, before its gate [B, T, X]. The experts are applied
    one by one, on every mesh and from host memory, as `MoE.mix` does, which also adds the shared one."""
    assert isinstance(layer.ffn, MoE) and seen.routing is not None
    mix, expert_BTX = layer.ffn.mix, seen.routing.expert_BTX
    mid_BTD = seen.x_BTD + seen.attention_BTD.astype(jnp.float32)
    h_BTD = rms_norm(mid_BTD, layer.ffn_norm_D, layer.cfg.rms_norm_eps).astype(layer.dtype)
    h_tD, expert_tX = h_BTD.reshape(-1, h_BTD.shape[-1]), expert_BTX.reshape(-1, expert_BTX.shape[-1])
    one_tX = jnp.ones(expert_tX.shape, jnp.float32)
    shared_tD = mix(h_tD, jnp.full_like(expert_tX, layer.cfg.n_routed_experts), one_tX)

    def of(x):
        chosen_tX = jnp.where(jnp.arange(expert_tX.shape[1]) == x, expert_tX, layer.cfg.n_routed_experts)
        return jnp.linalg.norm(mix(h_tD, chosen_tX, one_tX) - shared_tD, axis=-1)

    norm_Xt = jax.lax.map(of, jnp.arange(expert_tX.shape[1]))
    return norm_Xt.T.reshape(expert_BTX.shape)


def predict(model: Model, x_BTD: jax.Array, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the `width` tokens that the head finds most likely next for a residual stream, with their
    log-probabilities [B, T, w], and the entropy of each prediction in nats [B, T]."""

    def of(x_BTD):
        logprob_BTV = jax.nn.log_softmax(model.logits(model.normalize(x_BTD)), axis=-1)
        top_logprob_BTw, top_id_BTw = jax.lax.top_k(logprob_BTV, min(width, logprob_BTV.shape[-1]))
        return top_id_BTw, top_logprob_BTw, -jnp.sum(jnp.exp(logprob_BTV) * logprob_BTV, axis=-1)

    at_once = max(1, MAX_TEMPORARY // (len(x_BTD) * model.cfg.vocab_size))
    return map_tokens(of, (x_BTD,), at_once)
