"""Speculative decoding with the MTP head (DeepSeek-V3, arXiv 2412.19437, 2.2).

A step drafts some tokens, processes them in one go, and keeps those that the model itself samples. Model and MTP head
sample with the same noise, which a row's seed and the position give, so a draft is right where both make the same of
it: in float32 the result is token for token that of `prefill_decode.step`, greedy or drawn, only sooner.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..model.model import Model
from ..parallel.sharding import shard_rows
from .prefill_decode import Generated, State, advance
from .sampler import SamplerParams, process_logits, sample


class Proposal(NamedTuple):
    """The tokens that a step processes, the last one of each row and its drafts, and the parameters that its u new
    tokens are sampled with. A draft of -1 is never right."""

    tokens_Bu: jax.Array
    params: tuple[SamplerParams, ...]


def step(model: Model, params: SamplerParams, state: State, generated: Generated) -> tuple[State, Generated]:
    """Draft u - 1 tokens a row, and keep those that the model agrees with, and one token more."""
    state, tokens_Bu = draft(model, params, state)
    return verify(model, Proposal(tokens_Bu, (params,) * tokens_Bu.shape[1]), state, generated)


def verify(model: Model, proposal: Proposal, state: State, generated: Generated) -> tuple[State, Generated]:
    """Keep the drafts that the model agrees with, and one token more."""
    length_B, active_B, new_B = state.cache.length_B, ~state.done_B, state.new_B
    tokens_Bu, each = proposal
    h_BuD, cache = model(jnp.maximum(tokens_Bu, 0), state.cache, jnp.zeros_like(length_B))
    logit_BuV = shard_rows(model.mesh, model.logits(h_BuD))

    state = dataclasses.replace(state, step_B=state.step_B + active_B.astype(jnp.int32))
    sampled = []
    for u, params in enumerate(each):
        state, generated = advance(params, state, generated, logit_BuV[:, u], length_B + 1 + u, active_B)
        sampled.append(state.token_B)
        if u + 1 < len(each):
            active_B &= ~state.done_B & (state.token_B == tokens_Bu[:, u + 1])
    count_B = state.new_B - new_B
    state = dataclasses.replace(
        state,
        cache=dataclasses.replace(cache, length_B=length_B + count_B),
        hidden_BuD=h_BuD,
        next_Bu=jnp.stack(sampled, axis=1),
        unread_B=count_B,
    )
    return state, generated


def draft(model: Model, params: SamplerParams, state: State) -> tuple[State, jax.Array]:
    """Return the last token of each row and u - 1 drafts, and the state, in whose MTP cache only the slots of unread
    tokens are true.

    The head first reads the unread tokens with the model's own hidden vectors; after that it goes on from its own.
    """
    mtp, cache, length_B = model.mtp, state.draft_cache, state.cache.length_B
    assert mtp is not None and cache is not None
    cache = cache.with_table(state.cache.table_Bd)
    slot_Bu = (length_B - state.unread_B)[:, None] + jnp.arange(state.next_Bu.shape[1], dtype=jnp.int32)
    z_BuD, cache = mtp(state.hidden_BuD, state.next_Bu, cache, slot_Bu)
    z_B1D = jnp.take_along_axis(z_BuD, jnp.maximum(state.unread_B - 1, 0)[:, None, None], axis=1)
    drafts: list[jax.Array] = []
    for u in range(state.next_Bu.shape[1] - 1):
        if u:
            z_B1D, cache = mtp(z_B1D, drafts[-1][:, None], cache, (length_B - 1 + u)[:, None])
        logit_BV = shard_rows(model.mesh, mtp.logits(z_B1D)[:, 0])
        logit_BV = process_logits(params, logit_BV, state.in_prompt_BV, state.generated_BV)
        drafts.append(sample(params, logit_BV, length_B + 1 + u))
    state = dataclasses.replace(state, draft_cache=cache.with_table(None))
    return shard_rows(model.mesh, (state, jnp.stack([state.token_B, *drafts], axis=1)))
