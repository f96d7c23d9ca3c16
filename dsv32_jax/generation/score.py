"""Log-probabilities of given tokens: what perplexity and the comparison of models are made of."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..model import cache, checks
from ..model.attention import LARGEST_TEMPORARY
from ..model.model import Model
from ..model.ops import over_tokens
from ..parallel.multihost import fetch
from ..system.compilation import prepare
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
    prepare()
    cfg = checks.config_of(model)
    rows = checks.prompts(tokens, cfg.vocab_size)
    top_logprobs = checks.whole("top_logprobs", top_logprobs, 0, min(MOST_TOP_LOGPROBS, cfg.vocab_size))
    if batch_size is not None:
        batch_size = checks.whole("batch_size", batch_size, 1, 1 << 20)
    stored = cache.dtype_of(cache_dtype, model.dtype)
    capacity = bucket(checks.length(max(map(len, rows)), cfg.max_position_embeddings))
    each = batch_size or memory.rows_at_once(cfg, len(rows), 1, capacity, stored, 0, model.mesh)
    found = Score([[] for _ in rows], [[] for _ in rows])
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), each):
        _score(model, rows, order[start : start + each], capacity, stored, top_logprobs, found)
    return found


def _score(model: Model, rows, group: list[int], capacity: int, stored, width: int, found: Score) -> None:
    """Append what is found of the rows in `group`."""
    batch = memory.rows_bucket(len(group))
    context = placed(model, blank(model.cfg, model.dtype, batch, capacity, stored, 0))
    for tokens_BT, next_BT, count_B in chunks([rows[i] for i in group], batch):
        context, *parts = _scored_jit(model, context, tokens_BT, next_BT, count_B, width=width)
        logprob_BT, id_BTw, top_BTw = (fetch(part) for part in parts)
        for b, i in enumerate(group):
            known = min(int(count_B[b]), len(rows[i]) - 1 - len(found.logprobs[i]))
            found.logprobs[i].extend(logprob_BT[b, :known].tolist())
            pairs = zip(id_BTw[b, :known].tolist(), top_BTw[b, :known].tolist(), strict=True)
            found.top_logprobs[i].extend(list(zip(*pair, strict=True)) for pair in pairs)


def scored(
    model: Model, context: Context, tokens_BT: jax.Array, next_BT: jax.Array, count_B: jax.Array, width: int
) -> tuple[Context, jax.Array, jax.Array, jax.Array]:
    """The context with these tokens, the log-probability [B, T] of the token after each, and the `width` likeliest."""
    h_BTD, filled = model(tokens_BT, context.cache, count_B)

    def of(h_BTD, next_BT):
        logprob_BTV = jax.nn.log_softmax(model.logits(h_BTD), axis=-1)
        top_BTw, id_BTw = jax.lax.top_k(logprob_BTV, width)
        return jnp.take_along_axis(logprob_BTV, next_BT[..., None], axis=-1)[..., 0], id_BTw, top_BTw

    at_once = max(1, LARGEST_TEMPORARY // (len(count_B) * model.cfg.vocab_size))
    logprob_BT, id_BTw, top_BTw = over_tokens(of, (h_BTD, next_BT), at_once)
    return dataclasses.replace(context, cache=filled), logprob_BT, id_BTw, top_BTw


_scored_jit = jax.jit(scored, static_argnames="width", donate_argnames="context")
