"""How much of dense attention's weight the selected positions keep: what the indexer's choice costs, measured."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..model import checks, mla
from ..model.attention import queries_at_once
from ..model.block import Block, Seen
from ..model.cache import LayerCache
from ..model.model import Model, forward
from ..model.ops import over_tokens, rms_norm, rotation


class Mass(NamedTuple):
    """Shares of dense attention's weight, mean over heads, [layers, rows, tokens]; NaN beyond a row's end.

    kept    on the positions that the indexer selected: 1 where it selected all
    best    on as many positions as it selected, the best for this measure: the most that `kept` could be
    recent  on as many of the last positions
    """

    kept: np.ndarray
    best: np.ndarray
    recent: np.ndarray


def kept_mass(model: Model, tokens: Sequence[Sequence[int]]) -> Mass:
    """The mass of every token of the given rows, from one forward over them and the dense weights beside it.

    Attention itself stays sparse, so each layer sees what it sees when generating. Work and memory grow with the square
    of the longest row.
    """
    rows = checks.prompts(tokens, model.cfg.vocab_size)
    count_B = np.array([len(row) for row in rows], np.int32)
    tokens_BT = np.zeros((len(rows), count_B.max()), np.int32)
    for b, row in enumerate(rows):
        tokens_BT[b, : len(row)] = row
    out = forward(model, tokens_BT, count_B=count_B, seen=True)
    assert out.seen is not None
    shares = [
        np.asarray(_shares(layer, seen, cache))
        for layer, seen, cache in zip(model.layers, out.seen, out.cache.layers, strict=True)
    ]
    real_BT = np.arange(tokens_BT.shape[1]) < count_B[:, None]
    return Mass(*np.where(real_BT, np.stack(shares, axis=1), np.nan))


@jax.jit
def _shares(layer: Block, seen: Seen, cache: LayerCache) -> jax.Array:
    """Kept, best and recent [3, B, T] of one layer whose row starts at position 0."""
    cfg = layer.cfg
    batch, count = seen.x_BTD.shape[:2]
    position_BT = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (batch, count))
    h_BTD = rms_norm(seen.x_BTD, layer.attn_norm_D, cfg.rms_norm_eps).astype(layer.dtype)
    queries = layer.mla.queries(layer.mla.latent_query(h_BTD), *rotation(position_BT, cfg))

    def of(q_c_BTHN, q_r_BTHR, selected_BTk, position_BT):
        slot_S = jnp.arange(cache.capacity)
        visible_BTS = cache.visible(position_BT)
        weight_BTHS, _ = mla.absorbed_weights(layer.mla, q_c_BTHN, q_r_BTHR, cache, visible_BTS)
        weight_BTS = weight_BTHS.mean(axis=2)
        chosen_BTk = jnp.take_along_axis(weight_BTS, jnp.maximum(selected_BTk, 0), axis=-1)
        kept_BT = jnp.where(selected_BTk >= 0, chosen_BTk, 0).sum(axis=-1)
        best_BT = jax.lax.top_k(weight_BTS, selected_BTk.shape[-1])[0].sum(axis=-1)
        recent_BTS = visible_BTS & (slot_S > position_BT[..., None] - selected_BTk.shape[-1])
        return kept_BT, best_BT, jnp.where(recent_BTS, weight_BTS, 0).sum(axis=-1)

    block = max(1, queries_at_once(cfg, batch, cache.capacity) // max(1, cache.capacity // cfg.index_topk))
    return jnp.stack(over_tokens(of, (*queries, seen.selected_BTk, position_BT), block))
