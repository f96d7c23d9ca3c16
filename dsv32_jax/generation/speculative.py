"""Speculative decoding with the MTP head (DeepSeek-V3, arXiv 2412.19437, 2.2).

A step drafts some tokens, processes them in one go, and keeps those that the model itself samples. Model and MTP head
sample with the same noise, which a row's seed and the position give, so a draft is right where both make the same of
it: in float32 the result is token for token that of `prefill_decode.step`, greedy or drawn, only sooner.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ..model.model import Model
from ..parallel.sharding import shard_rows
from .prefill_decode import Generated, State, advance
from .sampler import SamplerParams, process_logits, sample


def step(model: Model, params: SamplerParams, state: State, generated: Generated) -> tuple[State, Generated]:
    """Draft u - 1 tokens a row, and keep those that the model agrees with, and one token more."""
    each = (params,) * state.next_Bu.shape[1]
    state, z_B1D, logit_BV = catch_up(model, state)
    state, tokens_Bu = draft(model, each[1:], state, z_B1D, logit_BV)
    state, logit_BuV = process(model, state, tokens_Bu)
    return accept(each, state, generated, tokens_Bu, logit_BuV)


def process(model: Model, state: State, tokens_Bu: jax.Array) -> tuple[State, jax.Array]:
    """Process the last token of each row and the drafts behind it. Return the state, in which rows are as long as
    before, and the logits [B, u, V]."""
    h_BuD, cache = model(tokens_Bu, state.cache, jnp.zeros_like(state.cache.length_B))
    state = dataclasses.replace(state, cache=cache, hidden_BuD=h_BuD)
    return shard_rows(model.mesh, (state, model.logits(h_BuD)))


def accept(
    each: Sequence[SamplerParams], state: State, generated: Generated, tokens_Bu: jax.Array, logit_BuV: jax.Array
) -> tuple[State, Generated]:
    """Sample a token behind each of `tokens_Bu`, with the parameters in `each` for it, as long as the one before is the
    draft that was processed. A draft of -1 is never right."""
    length_B, active_B, new_B = state.cache.length_B, ~state.done_B, state.new_B
    state = dataclasses.replace(state, step_B=state.step_B + active_B.astype(jnp.int32))
    sampled: list[jax.Array] = []
    for u, params in enumerate(each):
        if u:
            active_B &= ~state.done_B & (state.token_B == tokens_Bu[:, u])
        state, generated = advance(params, state, generated, logit_BuV[:, u], length_B + 1 + u, active_B)
        sampled.append(state.token_B)
    count_B = state.new_B - new_B
    state = dataclasses.replace(
        state,
        cache=dataclasses.replace(state.cache, length_B=length_B + count_B),
        next_Bu=jnp.stack(sampled, axis=1),
        unread_B=count_B,
    )
    return state, generated


def catch_up(model: Model, state: State) -> tuple[State, jax.Array, jax.Array]:
    """Let the MTP head read the tokens that it has not, with the model's own hidden vectors. Return the state, in whose
    MTP cache only the slots of those tokens are true, the head's hidden vectors [B, 1, D] of the last ones, and its
    logits [B, V]."""
    mtp, cache, length_B = model.mtp, state.draft_cache, state.cache.length_B
    assert mtp is not None and cache is not None
    slot_Bu = (length_B - state.unread_B)[:, None] + jnp.arange(state.next_Bu.shape[1], dtype=jnp.int32)
    z_BuD, cache = mtp(state.hidden_BuD, state.next_Bu, cache.with_table(state.cache.table_Bd), slot_Bu)
    z_B1D = jnp.take_along_axis(z_BuD, jnp.maximum(state.unread_B - 1, 0)[:, None, None], axis=1)
    state = dataclasses.replace(state, draft_cache=cache.with_table(None))
    return shard_rows(model.mesh, (state, z_B1D, mtp.logits(z_B1D)[:, 0]))


def draft(
    model: Model, each: Sequence[SamplerParams], state: State, z_B1D: jax.Array, logit_BV: jax.Array
) -> tuple[State, jax.Array]:
    """Return the state, and the last token of each row and u - 1 drafts, with the parameters in `each` for them. The
    MTP head goes on from what `catch_up` returned, and then from its own hidden vectors."""
    mtp, cache, length_B = model.mtp, state.draft_cache, state.cache.length_B
    assert mtp is not None and cache is not None
    tokens, cache = [state.token_B], cache.with_table(state.cache.table_Bd)
    for u, params in enumerate(each):
        if u:
            z_B1D, cache = mtp(z_B1D, tokens[-1][:, None], cache, (length_B - 1 + u)[:, None])
            logit_BV = shard_rows(model.mesh, mtp.logits(z_B1D)[:, 0])
        processed_BV = process_logits(params, logit_BV, state.in_prompt_BV, state.generated_BV)
        tokens.append(sample(params, processed_BV, length_B + 1 + u))
    state = dataclasses.replace(state, draft_cache=cache.with_table(None))
    return shard_rows(model.mesh, (state, jnp.stack(tokens, axis=1)))
