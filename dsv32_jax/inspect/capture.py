"""Prefill rows of tokens once more and keep what the layers compute: routing, index scores, attention, predictions."""

import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..config import Config
from ..errors import CapacityError
from ..generation import memory
from ..generation.request import capacity_for, chunk_size
from ..generation.score import Chunk, prefill_chunks
from ..generation.session_file import identity
from ..model import mla, validation
from ..model.attention import MAX_TEMPORARY, max_queries
from ..model.block import Block, Seen
from ..model.cache import Cache, LayerCache
from ..model.model import Model
from ..model.ops import map_tokens, rms_norm, rotation
from ..parallel.multihost import fetch
from ..system import host
from .traces import ARRAYS, KINDS, TOP, Trace, check_kinds, shapes

ALL = ("attention", "indexer", "logits", "routing")
"""The kinds that cost little beside a prefill; "mass" computes dense attention weights as well."""

Values = dict[str, jax.Array]
"""Arrays of a trace for one chunk of one layer, [B, T, ...]."""


def trace(
    model: Model,
    tokens: Sequence[Sequence[int]],
    keep: Collection[str] = ALL,
    *,
    cache_dtype: Any = None,
    batch_size: int | None = None,
) -> Trace:
    """Run rows of token ids (prompts with their answers, of any lengths) and return what every layer computed.

    `keep` names the kinds of arrays: "routing", "indexer", "attention", "logits" and "mass"; `Trace` lists their
    arrays. Rows are prefilled in chunks, as `score` does. In float32 the values are those that generated the answer.
    The work of "mass" grows with the square of the longest row.
    Raises UsageError for bad arguments and CapacityError, before anything runs, if the arrays do not fit in memory.
    """
    kinds = check_kinds(keep)
    cfg = validation.config_of(model)
    rows = validation.check_prompts(tokens, cfg.vocab_size)
    longest = validation.check_length(max(map(len, rows)), cfg.max_position_embeddings)
    require_room(cfg, len(rows), longest, kinds)
    arrays: dict[str, np.ndarray] = {}
    for name, shape in shapes(cfg, kinds, len(rows), longest).items():
        _, dtype, padding = ARRAYS[name]
        arrays[name] = np.full(shape, padding, dtype)
    for b, row in enumerate(rows):
        arrays["tokens"][b, : len(row)], arrays["length"][b] = row, len(row)
    capacity = capacity_for(cfg, longest)
    extra = nbytes(cfg, kinds, 1, capacity) * min(chunk_size(), capacity) // capacity
    step = partial(_observe_jit, kinds)
    for chunk in prefill_chunks(model, rows, step, cache_dtype=cache_dtype, batch_size=batch_size, extra=extra):
        _copy(chunk, arrays)
    return Trace(kinds, arrays, {"config": cfg.to_dict(), "model": identity(model)})


def nbytes(cfg: Config, kinds: Collection[str], rows: int, tokens: int) -> int:
    """Return the size of a trace in bytes."""
    return 4 * sum(map(math.prod, shapes(cfg, kinds, rows, tokens).values()))


def require_room(cfg: Config, rows: int, tokens: int, kinds: Collection[str]) -> None:
    """Raise CapacityError if a trace does not fit in the host's memory."""
    needed, free = nbytes(cfg, kinds, rows, tokens), host.get_free_memory()
    if needed > free * memory.CACHE_SHARE:
        each = ", ".join(f"{kind} {nbytes(cfg, (kind,), 1, tokens) / tokens / 1e3:.1f} kB" for kind in kinds)
        raise CapacityError(
            f"a trace of {rows} rows of up to {tokens} tokens takes {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are "
            f"free; nothing was run. A token takes: {each}. Keep fewer kinds, or trace fewer rows or shorter ones"
        )


def _copy(chunk: Chunk, arrays: Mapping[str, np.ndarray]) -> None:
    """Copy the values of a chunk to their places in the arrays of the whole trace."""
    layers, head = jax.tree.map(fetch, chunk.values)
    for name, array in arrays.items():
        targets, sources = [array], [head[name]] if name in head else []
        if parts := [values[name] for values in layers if name in values]:
            targets, sources = array, parts
        for target, source in zip(targets, sources, strict=False):
            for b, (row, count) in enumerate(zip(chunk.rows, chunk.counts, strict=True)):
                target[row, chunk.start : chunk.start + count] = source[b, :count][..., : target.shape[-1]]


def observe(
    kinds: tuple[str, ...], model: Model, cache: Cache, tokens_BT: jax.Array, next_BT: jax.Array, count_B: jax.Array
) -> tuple[Cache, tuple[list[Values], Values]]:
    """Prefill a chunk and return the new cache, and the values of each layer and of the head, [B, T, ...]."""
    position_BT = cache.length_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    h_BTD, filled, seen = model.observe(tokens_BT, cache, count_B)
    layers = [
        _observe_layer(kinds, layer, layer_seen, layer_cache, position_BT)
        for layer, layer_seen, layer_cache in zip(model.layers, seen, filled.layers, strict=True)
    ]
    head = _predictions(model, h_BTD) if "logits" in kinds else {}
    return filled, (layers, head)


_observe_jit = jax.jit(observe, static_argnames="kinds", donate_argnames="cache")


def _observe_layer(
    kinds: tuple[str, ...], layer: Block, seen: Seen, cache: LayerCache, position_BT: jax.Array
) -> Values:
    found: Values = {}
    if "routing" in kinds and seen.routing is not None:
        found |= {"expert": seen.routing.expert_BTX, "gate": seen.routing.gate_BTX}
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


def _predictions(model: Model, h_BTD: jax.Array) -> Values:
    """Return the most likely next tokens with their log-probabilities, and the entropy of each prediction."""

    def of(h_BTD):
        logprob_BTV = jax.nn.log_softmax(model.logits(h_BTD), axis=-1)
        top_logprob_BTw, top_id_BTw = jax.lax.top_k(logprob_BTV, min(TOP, logprob_BTV.shape[-1]))
        return top_id_BTw, top_logprob_BTw, -jnp.sum(jnp.exp(logprob_BTV) * logprob_BTV, axis=-1)

    at_once = max(1, MAX_TEMPORARY // (len(h_BTD) * model.cfg.vocab_size))
    return dict(zip(KINDS["logits"], map_tokens(of, (h_BTD,), at_once), strict=True))
