"""Prefill in chunks and the decode step: functions from a state to the next one.

Rows are independent. A row that is done changes nothing and is a free place. Lowercase axes of this room: c, the rows
of a chunk; u = 1 + draft, the tokens of a decode step; m, the tokens a row can generate in one call of `decode`; w, the
most likely tokens that are reported at each position.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ..config import Config
from ..model.cache import Cache, LayerCache, empty, empty_layer
from ..model.model import Model
from ..parallel.multihost import fetch
from ..parallel.sharding import shard_rows
from ..system.summary import Summarized
from .sampler import SamplerParams, process_logits, sample

Tree = TypeVar("Tree")
Caches = tuple[Cache, LayerCache | None]
"""The KV cache, and that of the MTP head where tokens are drafted."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class State(Summarized):
    """The device state of a batch: passed in, donated and returned by every program.

    cache         the KV cache of the tokens processed so far, and how many each row has
    draft_cache   the cache of the MTP head, whose slot i holds token i + 1; None where nothing is drafted
    token_B       the last token, which the next step processes
    hidden_BuD    the model's hidden vectors of the last `unread_B` tokens, which the MTP head has not read
    next_Bu       the token after each of them
    in_prompt_BV  whether a token occurs in the prompt;  generated_BV: how often it was generated since
    new_B         tokens generated;  answer_B: those of the answer, after any thoughts;  step_B: decode steps taken
    done_B        rows that have ended;  finite_B: whether all their logits were finite
    """

    cache: Cache
    draft_cache: LayerCache | None
    token_B: jax.Array
    hidden_BuD: jax.Array
    next_Bu: jax.Array
    unread_B: jax.Array
    in_prompt_BV: jax.Array
    generated_BV: jax.Array
    new_B: jax.Array
    answer_B: jax.Array
    step_B: jax.Array
    done_B: jax.Array
    finite_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Generated(Summarized):
    """The tokens of one call of `decode`, the first `count_B` of each row, with their
    log-probabilities and the most likely tokens at their positions."""

    count_B: jax.Array
    token_Bm: jax.Array
    logprob_Bm: jax.Array
    top_id_Bmw: jax.Array
    top_logprob_Bmw: jax.Array


Step = Callable[[Model, SamplerParams, State, Generated], tuple[State, Generated]]


@partial(jax.jit, static_argnames=("cfg", "batch", "capacity", "dtype", "draft"))
def empty_caches(cfg: Config, batch: int, capacity: int, dtype: np.dtype, draft: int) -> Caches:
    """Return caches without tokens."""
    return empty(cfg, batch, capacity, dtype), empty_layer(cfg, batch, capacity, dtype) if draft else None


def new_state(model: Model, caches: Caches, draft: int) -> State:
    """Return the state of rows whose `caches` hold nothing, or the beginning of their prompts; all are done. Nothing is
    compiled."""
    batch, vocab_size = len(caches[0].length_B), model.cfg.vocab_size

    def zeros(*sizes: int, dtype: Any = np.int32) -> Any:
        return np.zeros((batch, *sizes), dtype)

    state = State(
        *caches,
        token_B=zeros(),
        hidden_BuD=zeros(1 + draft, model.cfg.hidden_size, dtype=model.dtype),
        next_Bu=zeros(1 + draft),
        unread_B=zeros(),
        in_prompt_BV=zeros(vocab_size, dtype=bool),
        generated_BV=zeros(vocab_size),
        new_B=zeros(),
        answer_B=zeros(),
        step_B=zeros(),
        done_B=~zeros(dtype=bool),
        finite_B=~zeros(dtype=bool),
    )
    return place(model, state)


def place(model: Model, tree: Tree) -> Tree:
    """Put arrays with a row of the batch each where the weights are, split over the mesh axis "data".

    JAX compiles for arrays that are bound to their devices and for those that are not: everything a program is given is
    bound, so a second chunk or turn does not compile `prefill` again.
    """
    if model.mesh is not None:
        return shard_rows(model.mesh, tree)
    return jax.device_put(tree, jax.tree.leaves(model)[0].sharding)


def prefill(
    model: Model, state: State, tokens_cT: jax.Array, next_cT: jax.Array, count_c: jax.Array, row_c: jax.Array
) -> State:
    """Return the state after `count_c` more prompt tokens of the rows `row_c`; a row beyond the batch is padding.

    `next_cT` has the token after each. The one after a row's last token here is what the next step processes.
    """
    cache, draft_cache = state.cache, state.draft_cache
    length_c = cache.length_B.at[row_c].get(mode="fill", fill_value=0)
    table_cd = cache.table_Bd
    if table_cd is not None:
        table_cd = table_cd.at[row_c].get(mode="fill", fill_value=-1)
    rows = shard_rows(model.mesh, Cache(cache.layers, length_c, table_cd))
    position_cT = length_c[:, None] + jnp.arange(tokens_cT.shape[1], dtype=jnp.int32)
    h_cTD, rows = model(tokens_cT, rows, count_c)
    if draft_cache is not None and model.mtp is not None:
        _, draft_cache = model.mtp(h_cTD, next_cT, draft_cache.with_table(table_cd), position_cT)
        draft_cache = draft_cache.with_table(None)
    last_c1 = jnp.maximum(count_c - 1, 0)[:, None]
    last_cD = jnp.take_along_axis(h_cTD, last_c1[..., None], axis=1)[:, 0]
    next_c = jnp.take_along_axis(next_cT, last_c1, axis=1)[:, 0]
    state = dataclasses.replace(
        state,
        cache=Cache(rows.layers, cache.length_B.at[row_c].set(rows.length_B, mode="drop"), cache.table_Bd),
        draft_cache=draft_cache,
        token_B=state.token_B.at[row_c].set(next_c, mode="drop"),
        hidden_BuD=state.hidden_BuD.at[row_c, 0].set(last_cD, mode="drop"),
        next_Bu=state.next_Bu.at[row_c, 0].set(next_c, mode="drop"),
        unread_B=state.unread_B.at[row_c].set(1, mode="drop"),
    )
    return shard_rows(model.mesh, state)


def step(model: Model, params: SamplerParams, state: State, generated: Generated) -> tuple[State, Generated]:
    """Process each row's last token and sample the next one."""
    active_B = ~state.done_B
    h_B1D, cache = model(state.token_B[:, None], state.cache, active_B.astype(jnp.int32))
    state = dataclasses.replace(state, cache=cache, step_B=state.step_B + active_B.astype(jnp.int32))
    logit_BV = shard_rows(model.mesh, model.logits(h_B1D)[:, 0])
    return advance(params, state, generated, logit_BV, cache.length_B, active_B)


def decode(
    step: Step, model: Model, params: SamplerParams, state: State, steps: Any, fewest: Any, slots: int, width: int
) -> tuple[State, Generated]:
    """Take `step` while more than `fewest` rows go on, at most `steps` times; a row has room
    for `slots` tokens.

    The barrier ties the weights to the step: XLA would otherwise dequantize all of them before the loop, and keep that.
    """

    def unfinished(carry):
        taken, state, _ = carry
        return (taken < steps) & (jnp.sum(~state.done_B) > fewest)

    def take_step(carry):
        taken, state, generated = carry
        here, state = jax.lax.optimization_barrier((model, state))
        return taken + 1, *step(here, params, state, generated)

    generated = shard_rows(model.mesh, nothing_generated(len(state.token_B), slots, width))
    return shard_rows(model.mesh, jax.lax.while_loop(unfinished, take_step, (jnp.int32(0), state, generated))[1:])


def decode_layerwise(
    step: Step, model: Model, params: SamplerParams, state: State, steps: int, fewest: int, slots: int, width: int
) -> tuple[State, Generated]:
    """Do what `decode` does, calling each step from Python."""
    generated = nothing_generated(len(state.token_B), slots, width)
    for _ in range(steps):
        state, generated = step(model, params, state, generated)
        if (~fetch(state.done_B)).sum() <= fewest:
            break
    return state, generated


def nothing_generated(batch: int, slots: int, width: int) -> Generated:
    """Return no tokens, and room for `slots` of each row."""
    return Generated(
        jnp.zeros(batch, jnp.int32),
        jnp.zeros((batch, slots), jnp.int32),
        jnp.zeros((batch, slots), jnp.float32),
        jnp.zeros((batch, slots, width), jnp.int32),
        jnp.zeros((batch, slots, width), jnp.float32),
    )


@partial(jax.jit, inline=True)
@jax.named_scope("sampling")
def advance(
    params: SamplerParams,
    state: State,
    generated: Generated,
    logit_BV: jax.Array,
    position_B: jax.Array,
    active_B: jax.Array,
) -> tuple[State, Generated]:
    """Sample one more token, at `position_B`, in the active rows; a token of `end_BV` ends its row.

    Log-probabilities are the model's own, before penalties, bias, temperature and truncation. On a mesh a device should
    have all logits of its rows, or it asks the others for every sum and maximum.
    """
    finite_B = state.finite_B & (~active_B | jnp.all(jnp.isfinite(logit_BV), axis=-1))
    too_early_BV = params.end_BV & (state.answer_B < params.min_answer_B)[:, None]
    processed_BV = process_logits(params, logit_BV, state.in_prompt_BV, state.generated_BV)
    processed_BV = jnp.where(too_early_BV, -jnp.inf, processed_BV)
    token_B = jnp.where(active_B, sample(params, processed_BV, position_B), state.token_B)
    logprob_BV = jax.nn.log_softmax(logit_BV, axis=-1)
    top_logprob_Bw, top_id_Bw = jax.lax.top_k(logprob_BV, generated.top_id_Bmw.shape[-1])

    one_B = active_B.astype(jnp.int32)
    slot_B = jnp.where(active_B, generated.count_B, generated.token_Bm.shape[1])
    put = jax.vmap(lambda slots, slot, new: slots.at[slot].set(new, mode="drop"))
    generated = Generated(
        generated.count_B + one_B,
        put(generated.token_Bm, slot_B, token_B),
        put(generated.logprob_Bm, slot_B, _of_token(logprob_BV, token_B)),
        put(generated.top_id_Bmw, slot_B, top_id_Bw),
        put(generated.top_logprob_Bmw, slot_B, top_logprob_Bw),
    )
    is_answer_B = (params.thoughts_end_B < 0) | (_of_token(state.generated_BV, params.thoughts_end_B) > 0)
    new_B = state.new_B + one_B
    ended_B = _of_token(params.end_BV, token_B) | (new_B >= params.max_new_B) | ~finite_B
    count = jax.vmap(lambda row, token, one: row.at[token].add(one))
    state = dataclasses.replace(
        state,
        token_B=token_B,
        generated_BV=count(state.generated_BV, token_B, one_B),
        new_B=new_B,
        answer_B=state.answer_B + jnp.where(is_answer_B, one_B, 0),
        done_B=state.done_B | (active_B & ended_B),
        finite_B=finite_B,
    )
    return state, generated


def _of_token(of_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(of_BV, token_B[:, None], axis=1)[:, 0]
