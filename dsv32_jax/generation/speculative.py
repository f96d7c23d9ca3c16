"""Speculative decoding with the drafting layer (DeepSeek-V3, arXiv 2412.19437, 2.2; MTP).

A step drafts d tokens, processes them in one go, and keeps those that the model itself would have chosen. Model and
drafting layer choose with the same noise (a row's key and the position give it), so a draft is right when both make the
same of it: what comes out is token for token what `decoding.step` makes, greedy or drawn, only sooner.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ..model.cache import LayerCache
from ..model.model import Model
from ..parallel.sharding import by_rows
from .prefill_decode import Fresh, State, Task, chosen
from .sampler import choose, weighed


def step(model: Model, task: Task, state: State) -> State:
    """Draft as many tokens as `state.fresh` has room for, and keep what the model agrees with, and one token more."""
    length_B, on_B = state.cache.length_B, ~state.done_B
    draft_Bd, drafting = _drafts(model, task, state)
    drafts = draft_Bd.shape[1]
    tokens_BT = jnp.concatenate([state.token_B[:, None], draft_Bd], axis=1)
    h_BTD, cache = model(tokens_BT, state.cache, jnp.zeros_like(length_B))
    logit_BTV = by_rows(model.mesh, model.logits(h_BTD))

    made_B = state.made_B
    state = dataclasses.replace(state, step_B=state.step_B + on_B.astype(jnp.int32))
    token_BT = []
    for t in range(drafts + 1):
        state = chosen(task, state, logit_BTV[:, t], length_B + 1 + t, on_B)
        token_BT.append(state.token_B)
        if t < drafts:
            on_B &= ~state.done_B & (state.token_B == draft_Bd[:, t])
    count_B = state.made_B - made_B
    fresh = Fresh(drafting, h_BTD, jnp.stack(token_BT, axis=1), count_B)
    return dataclasses.replace(state, cache=dataclasses.replace(cache, length_B=length_B + count_B), fresh=fresh)


def _drafts(model: Model, task: Task, state: State) -> tuple[jax.Array, LayerCache]:
    """d drafts a row [B, d], and the drafting layer's cache, in which only the slots of fresh tokens are true.

    The layer first reads the fresh tokens with the model's own hidden vectors; after that it goes on from its own.
    """
    fresh, mtp, length_B = state.fresh, model.mtp, state.cache.length_B
    assert fresh is not None and mtp is not None
    slot_BT = (length_B - fresh.count_B)[:, None] + jnp.arange(fresh.next_BT.shape[1], dtype=jnp.int32)
    z_BTD, cache = mtp(fresh.h_BTD, fresh.next_BT, fresh.cache, slot_BT)
    z_B1D = jnp.take_along_axis(z_BTD, jnp.maximum(fresh.count_B - 1, 0)[:, None, None], axis=1)
    drafts = []
    for k in range(fresh.next_BT.shape[1] - 1):
        if k:
            z_B1D, cache = mtp(z_B1D, drafts[-1][:, None], cache, (length_B - 1 + k)[:, None])
        logit_BV = weighed(task.knobs, state.tally, by_rows(model.mesh, mtp.logits(z_B1D)[:, 0]))
        drafts.append(choose(task.knobs, logit_BV, length_B + 1 + k))
    return jnp.stack(drafts, axis=1), cache
