"""Log-probabilities of given tokens: what perplexity and the comparison of models are made of."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..errors import require_integer
from ..model import cache, validation
from ..model.attention import LARGEST_TEMPORARY
from ..model.model import Model
from ..model.ops import over_tokens
from ..parallel.multihost import fetch
from ..system.compilation import initialize
from . import memory
from .prefill_decode import Context, blank, placed
from .request import MOST_TOP_LOGPROBS, bucket, chunks


@dataclasses.dataclass(frozen=True)
class Score:
    """For each row the natural log-probability of each token but the first, given those before it.

    `top_logprobs` has the likeliest tokens at the same places, (id, log-probability), as many as were asked for.
    """

    logprobs: list[list[float]]
    top_logprobs: list[list[list[tuple[int, float]]]]


def score(
    model: Model,
    tokens: Sequence[Sequence[int]],
    *,
    top_logprobs: int = 0,
    cache_dtype: Any = None,
    batch_size: int | None = None,
) -> Score:
    """Score rows of token ids, of any lengths, chunk by chunk: the logits of all positions are never there at once."""
    cfg = validation.config_of(model)
    rows = validation.check_prompts(tokens, cfg.vocab_size)
    top_logprobs = require_integer("top_logprobs", top_logprobs, 0, min(MOST_TOP_LOGPROBS, cfg.vocab_size))
    found = Score([[] for _ in rows], [[] for _ in rows])
    step = partial(_scored_jit, width=top_logprobs)
    for chunk in prefill_chunks(model, rows, step, cache_dtype=cache_dtype, batch_size=batch_size):
        logprob_BT, id_BTw, top_BTw = map(fetch, chunk.values)
        for b, (i, count) in enumerate(zip(chunk.rows, chunk.counts, strict=True)):
            known = min(count, len(rows[i]) - 1 - len(found.logprobs[i]))
            found.logprobs[i].extend(logprob_BT[b, :known].tolist())
            pairs = zip(id_BTw[b, :known].tolist(), top_BTw[b, :known].tolist(), strict=True)
            found.top_logprobs[i].extend(list(zip(*pair, strict=True)) for pair in pairs)
    return found


class Chunk(NamedTuple):
    """Values [B, T, ...] of a chunk of some rows: b holds `counts[b]` tokens of row `rows[b]` from position `start`."""

    rows: list[int]
    start: int
    counts: list[int]
    values: Any


def prefill_chunks(
    model: Model,
    rows: Sequence[Sequence[int]],
    step: Callable,
    *,
    cache_dtype: Any = None,
    batch_size: int | None = None,
    extra: int = 0,
) -> Iterator[Chunk]:
    """Prefill checked rows of token ids in chunks and yield the values that `step` computes from each.

    `step(model, context, tokens_BT, next_BT, count_B)` returns the context with the chunk and a pytree of [B, T, ...]
    arrays, which takes `extra` bytes a row. B is a power of two; rows that fit in one batch keep their order. Raises
    UsageError, or CapacityError if not even one row fits in memory.
    """
    initialize()
    cfg = model.cfg
    if batch_size is not None:
        batch_size = require_integer("batch_size", batch_size, 1, 1 << 20)
    stored = cache.dtype_of(cache_dtype, model.dtype)
    capacity = bucket(validation.check_length(max(map(len, rows)), cfg.max_position_embeddings))
    each = batch_size or memory.plan_batch(cfg, len(rows), 1, capacity, stored, 0, model.mesh, extra)
    order = list(range(len(rows)))
    if each < len(rows):
        order.sort(key=lambda i: len(rows[i]))
    for first in range(0, len(order), each):
        group, start = order[first : first + each], 0
        batch = memory.round_up_rows(len(group))
        context = placed(model, blank(cfg, model.dtype, batch, capacity, stored, 0))
        for tokens_BT, next_BT, count_B in chunks([rows[i] for i in group], batch):
            context, values = step(model, context, tokens_BT, next_BT, count_B)
            yield Chunk(group, start, count_B[: len(group)].tolist(), values)
            start += tokens_BT.shape[1]


def scored(
    model: Model, context: Context, tokens_BT: jax.Array, next_BT: jax.Array, count_B: jax.Array, width: int
) -> tuple[Context, tuple[jax.Array, jax.Array, jax.Array]]:
    """The context with these tokens, the log-probability [B, T] of the token after each, and the `width` likeliest."""
    h_BTD, filled = model(tokens_BT, context.cache, count_B)

    def of(h_BTD, next_BT):
        logprob_BTV = jax.nn.log_softmax(model.logits(h_BTD), axis=-1)
        top_BTw, id_BTw = jax.lax.top_k(logprob_BTV, width)
        return jnp.take_along_axis(logprob_BTV, next_BT[..., None], axis=-1)[..., 0], id_BTw, top_BTw

    at_once = max(1, LARGEST_TEMPORARY // (len(count_B) * model.cfg.vocab_size))
    return dataclasses.replace(context, cache=filled), over_tokens(of, (h_BTD, next_BT), at_once)


_scored_jit = jax.jit(scored, static_argnames="width", donate_argnames="context")
