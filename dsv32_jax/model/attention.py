"""DeepSeek sparse attention: MLA over the tokens that the lightning indexer selects."""

import jax
import jax.numpy as jnp

from ..config import Config
from . import mla as forms
from .cache import LayerCache
from .indexer import KEYS, Indexer, score_slots, select_all, select_from_cache
from .mla import MLA
from .ops import map_tokens, rotation

MAX_TEMPORARY = 1 << 26
"""Elements of the largest temporary array in attention. Longer prompts are processed in blocks of queries."""


def attention(
    mla: MLA, indexer: Indexer, h_BTD: jax.Array, cache: LayerCache, position_BT: jax.Array
) -> tuple[jax.Array, LayerCache, tuple[jax.Array, jax.Array]]:
    """Attend from T new tokens at `position_BT` over the cache, including these tokens.

    Returns the output [B, T, D], the cache with the new tokens, the index scores [B, T, S] (float32, -inf where a slot
    is not visible) and the selected positions [B, T, min(K, S)] (-1 if fewer are visible).
    """
    cfg = mla.cfg
    cos_BTr, sin_BTr = rotation(position_BT, cfg)
    cache = cache.write(position_BT, *mla.keys(h_BTD, cos_BTr, sin_BTr), indexer.keys(h_BTD, cos_BTr, sin_BTr))
    c_q_BTQ = mla.latent_query(h_BTD)
    queries = (
        *mla.queries(c_q_BTQ, cos_BTr, sin_BTr),
        indexer.queries(c_q_BTQ, cos_BTr, sin_BTr),
        indexer.head_weights(h_BTD),
        position_BT,
    )
    kernels = forms.find_sparse_kernels(cfg, h_BTD.dtype, cache)
    block = max_queries(cfg, len(position_BT), cache.capacity, not kernels)

    def attend(q_c_BTHN, q_r_BTHR, q_index_BTIJ, w_BTI, position_BT):
        score_BTS = indexer.restrict(score_slots(q_index_BTIJ, w_BTI, cache, position_BT), position_BT, -jnp.inf)
        if cache.capacity > cfg.index_topk:
            selected_BTk = select_from_cache(score_BTS, position_BT, cfg.index_topk)
        else:
            visible_BTS = indexer.restrict(cache.visible(position_BT), position_BT, False)
            selected_BTk = select_all(visible_BTS)
            if not kernels:
                form = forms.choose_dense(cfg, position_BT.shape[1], cache.capacity)
                return form(mla, q_c_BTHN, q_r_BTHR, cache, visible_BTS), score_BTS, selected_BTk
        return forms.attend_sparse(mla, q_c_BTHN, q_r_BTHR, cache, selected_BTk, position_BT), score_BTS, selected_BTk

    o_BTHP, score_BTS, selected_BTk = map_tokens(attend, queries, block)
    return mla.output(o_BTHP), cache, (score_BTS, selected_BTk)


def max_queries(cfg: Config, batch: int, capacity: int, materialized: bool = True) -> int:
    """Return the number of queries whose temporary arrays stay within MAX_TEMPORARY: index scores and, if they are
    `materialized`, the products of all index heads, attention scores and gathered latents."""
    if not materialized:
        return max(1, MAX_TEMPORARY // (batch * capacity))
    selected = min(capacity, cfg.index_topk)
    scored = max(cfg.index_n_heads * min(capacity, KEYS), capacity)
    each = max(scored, cfg.num_attention_heads * selected, selected * cfg.kv_lora_rank)
    return max(1, MAX_TEMPORARY // (batch * each))
