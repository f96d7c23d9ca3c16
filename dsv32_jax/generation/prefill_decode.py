"""Prefill in chunks and the decode step, as functions from values to values. A row is independent of the others, so a
row that is done is a free slot.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ..config import Config
from ..model.cache import Cache, LayerCache, empty, empty_layer
from ..model.model import Model
from ..parallel.sharding import by_rows
from .sampler import Knobs, Tally, choose, weighed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """The tokens a model has read: what its layers cached, and the hidden vector of each row's last token.

    `drafting` is the cache of the drafting layer, whose slot i knows token i + 1; None where nothing will be drafted.
    """

    cache: Cache
    h_BD: jax.Array
    drafting: LayerCache | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Task:
    """What each row wants: how tokens are chosen, which end it (end_BV), how many it makes at least and at most."""

    knobs: Knobs
    end_BV: jax.Array
    least_B: jax.Array
    most_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fresh:
    """Tokens that the drafting layer has not read: up to T of them a row, the last of which may be followed by drafts.

    h_BTD  the model's hidden vectors of the last count_B tokens;  next_BT  the token after each of them
    """

    cache: LayerCache
    h_BTD: jax.Array
    next_BT: jax.Array
    count_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that changes while tokens are made.

    cache            of the tokens processed so far;  fresh  what drafting needs, None where nothing is drafted
    token_B          the last token chosen, which the next step processes;  tally  what penalties count
    tokens_Bm        all tokens chosen, m slots;  logprob_Bm  their log-probabilities;  made_B  how many
    top_id_Bmw       the w likeliest tokens at each place, with top_logprob_Bmw; w may be 0
    step_B           how many steps a row has taken;  done_B  rows that have ended
    finite_B         whether all logits so far were numbers
    """

    cache: Cache
    fresh: Fresh | None
    token_B: jax.Array
    tally: Tally
    tokens_Bm: jax.Array
    logprob_Bm: jax.Array
    top_id_Bmw: jax.Array
    top_logprob_Bmw: jax.Array
    made_B: jax.Array
    step_B: jax.Array
    done_B: jax.Array
    finite_B: jax.Array


@partial(jax.jit, static_argnames=("cfg", "compute", "batch", "capacity", "dtype", "drafts"))
def blank(cfg: Config, compute: np.dtype, batch: int, capacity: int, dtype: np.dtype, drafts: int) -> Context:
    """A context of no tokens, with a cache of the drafting layer where there will be drafts."""
    drafting = empty_layer(cfg, batch, capacity, dtype) if drafts else None
    h_BD = jnp.zeros((batch, cfg.hidden_size), compute)
    return Context(empty(cfg, batch, capacity, dtype), h_BD, drafting)


def placed(model: Model, context: Context) -> Context:
    """The context where the weights are, its rows split over the mesh axis "data". Arrays that JAX may still move and
    those it may not have programs of their own: without this a second chunk or turn would compile `read` again."""
    if model.mesh is not None:
        return by_rows(model.mesh, context)
    return jax.device_put(context, jax.tree.leaves(model)[0].sharding)


def read(model: Model, context: Context, tokens_BT: jax.Array, next_BT: jax.Array, count_B: jax.Array) -> Context:
    """The context with `count_B` more tokens a row (0 is fine); `next_BT` is the token after each, where it is known.

    Only the drafting layer looks at the next tokens; the slot of a row's last one is written again when it is known.
    """
    position_BT = context.cache.length_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    h_BTD, cache = model(tokens_BT, context.cache, count_B)
    drafting, mtp = context.drafting, model.mtp
    if drafting is not None and mtp is not None:
        _, drafting = mtp(h_BTD, next_BT, drafting, position_BT)
    last_BD = jnp.take_along_axis(h_BTD, jnp.maximum(count_B - 1, 0)[:, None, None], axis=1)[:, 0]
    h_BD = jnp.where((count_B > 0)[:, None], last_BD, context.h_BD)
    return by_rows(model.mesh, Context(cache, h_BD, drafting))


def spread(context: Context, row_B: jax.Array) -> Context:
    """The context with row `row_B[b]` as its row b: a prompt that is continued several times is read once."""
    return jax.tree.map(lambda x: x[row_B], context)


def rewound(context: Context, count: int) -> Context:
    """The context of the first `count` tokens of each row."""
    length_B = jnp.full_like(context.cache.length_B, count)
    return dataclasses.replace(context, cache=dataclasses.replace(context.cache, length_B=length_B))


def resized(context: Context, capacity: int) -> Context:
    """The context with room for `capacity` tokens a row; those beyond are forgotten."""
    if capacity == context.cache.capacity:
        return context
    drafting = None if context.drafting is None else context.drafting.resized(capacity)
    return Context(context.cache.resized(capacity), context.h_BD, drafting)


def resumed(model: Model, state: State) -> Context:
    """What the rows have read, for more to be read; the hidden vectors of their last tokens are not kept."""
    h_BD = jnp.zeros((len(state.token_B), model.cfg.hidden_size), model.dtype)
    return Context(state.cache, h_BD, None if state.fresh is None else state.fresh.cache)


def begin(
    model: Model, task: Task, context: Context, in_prompt_BV: jax.Array, slots: int, width: int, drafts: int
) -> State:
    """Choose each row's first token. `slots` tokens a row can be kept, with the `width` likeliest at each place."""
    batch = len(task.most_B)
    state = State(
        context.cache,
        None,
        jnp.zeros(batch, jnp.int32),
        Tally(in_prompt_BV, jnp.zeros(in_prompt_BV.shape, jnp.int32)),
        jnp.zeros((batch, slots), jnp.int32),
        jnp.zeros((batch, slots), jnp.float32),
        jnp.zeros((batch, slots, width), jnp.int32),
        jnp.zeros((batch, slots, width), jnp.float32),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros(batch, jnp.int32),
        task.most_B == 0,
        jnp.ones(batch, bool),
    )
    logit_BV = by_rows(model.mesh, model.logits(context.h_BD[:, None])[:, 0])
    state = chosen(task, state, logit_BV, context.cache.length_B, ~state.done_B)
    if context.drafting is None:
        return by_rows(model.mesh, state)
    later = [(0, 0), (0, drafts)]
    fresh = Fresh(
        context.drafting,
        jnp.pad(context.h_BD[:, None], [*later, (0, 0)]),
        jnp.pad(state.token_B[:, None], later),
        jnp.ones(batch, jnp.int32),
    )
    return by_rows(model.mesh, dataclasses.replace(state, fresh=fresh))


def step(model: Model, task: Task, state: State) -> State:
    """Process each row's last token and choose the next. A row that is done changes nothing."""
    on_B = ~state.done_B
    h_B1D, cache = model(state.token_B[:, None], state.cache, on_B.astype(jnp.int32))
    state = dataclasses.replace(state, cache=cache, step_B=state.step_B + on_B.astype(jnp.int32))
    return chosen(task, state, by_rows(model.mesh, model.logits(h_B1D)[:, 0]), cache.length_B, on_B)


def decode(step, model: Model, task: Task, state: State, steps) -> State:
    """`step` until every row is done, at most `steps` times.

    The barrier ties the weights to the step: XLA would else dequantize all of them before the loop, and keep that.
    """

    def unfinished(carry):
        taken, state = carry
        return (taken < steps) & ~jnp.all(state.done_B)

    def another(carry):
        taken, state = carry
        here, state = jax.lax.optimization_barrier((model, state))
        return taken + 1, step(here, task, state)

    return by_rows(model.mesh, jax.lax.while_loop(unfinished, another, (jnp.int32(0), state))[1])


@partial(jax.jit, inline=True)
@jax.named_scope("choice")
def chosen(task: Task, state: State, logit_BV: jax.Array, position_B: jax.Array, on_B: jax.Array) -> State:
    """`state` with one more token, at `position_B`, in the rows that are `on`; a token of `end_BV` ends its row.

    Log-probabilities are the model's own, before penalties, bias, temperature and truncation. On a mesh, a device
    should have all logits of its rows: else it asks the others for every sum and maximum.
    """
    finite_B = state.finite_B & (~on_B | jnp.all(jnp.isfinite(logit_BV), axis=-1))
    too_early_BV = task.end_BV & (state.made_B < task.least_B)[:, None]
    weighed_BV = jnp.where(too_early_BV, -jnp.inf, weighed(task.knobs, state.tally, logit_BV))
    token_B = jnp.where(on_B, choose(task.knobs, weighed_BV, position_B), state.token_B)
    logprob_BV = jax.nn.log_softmax(logit_BV, axis=-1)
    top_logprob_Bw, top_id_Bw = jax.lax.top_k(logprob_BV, state.top_id_Bmw.shape[-1])
    logprob_B = _of_token(logprob_BV, token_B)
    slot_B = jnp.where(on_B, state.made_B, state.tokens_Bm.shape[1])
    kept = jax.vmap(lambda slots, slot, new: slots.at[slot].set(new, mode="drop"))

    made_B = state.made_B + on_B.astype(jnp.int32)
    ended_B = _of_token(task.end_BV, token_B) | (made_B >= task.most_B) | ~finite_B
    return dataclasses.replace(
        state,
        token_B=token_B,
        tally=state.tally.add(token_B, on_B),
        tokens_Bm=kept(state.tokens_Bm, slot_B, token_B),
        logprob_Bm=kept(state.logprob_Bm, slot_B, logprob_B),
        top_id_Bmw=kept(state.top_id_Bmw, slot_B, top_id_Bw),
        top_logprob_Bmw=kept(state.top_logprob_Bmw, slot_B, top_logprob_Bw),
        made_B=made_B,
        done_B=state.done_B | (on_B & ended_B),
        finite_B=finite_B,
    )


def _of_token(of_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(of_BV, token_B[:, None], axis=1)[:, 0]
