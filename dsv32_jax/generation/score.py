"""Log-probabilities of given tokens: what perplexity and comparisons of models are made of."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import pluralize
from ..model import validation
from ..model.attention import MAX_TEMPORARY
from ..model.cache import Cache, dtype_of
from ..model.model import Model
from ..model.ops import map_tokens
from ..parallel.multihost import fetch
from ..system.compilation import count_compilations, initialize, log_slow_compilation
from ..system.summary import Summarized
from . import memory
from .options import check_option
from .prefill_decode import empty_caches, place
from .programs import bucket, capacity_for, chunk_size


@dataclasses.dataclass(frozen=True, repr=False)
class Score(Summarized):
    """For each row the natural log-probability of each token but the first, given those before it.

    `top_logprobs` has the most likely tokens at the same positions, (id, log-probability), as many as requested.
    """

    logprobs: list[list[float]]
    top_logprobs: list[list[list[tuple[int, float]]]]

    def summary(self) -> tuple[str, dict[str, str]]:
        """Return sizes and the mean log-probability."""
        count, total = sum(map(len, self.logprobs)), sum(map(sum, self.logprobs))
        mean = f"{total / count:.3f}" if count else "none"
        return f"Score of {pluralize(len(self.logprobs), 'row')}", {"tokens": str(count), "mean log-probability": mean}


def score(
    model: Model,
    tokens: Sequence[Sequence[int]],
    *,
    top_logprobs: int = 0,
    cache_dtype: Any = None,
    batch_size: int | None = None,
) -> Score:
    """Score rows of token ids, of any lengths. Rows are prefilled in chunks; the logits of all positions never exist at
    the same time. Raises UsageError, or CapacityError where not even one row fits in memory."""
    cfg = validation.config_of(model)
    rows = validation.check_prompts(tokens, cfg.vocab_size)
    top_logprobs = check_option("top_logprobs", top_logprobs, 0, cfg.vocab_size)
    found = Score([[] for _ in rows], [[] for _ in rows])
    step = partial(_score_chunk_jit, width=top_logprobs)
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
    """Prefill validated rows of token ids in chunks and yield the values that `step` computes from each.

    `step(model, cache, tokens_BT, next_BT, count_B)` returns the cache with the chunk and a pytree of [B, T, ...]
    arrays, which takes `extra` bytes a row. B is a power of two; rows that fit in one batch keep their order. Raises
    UsageError, or CapacityError if not even one row fits in memory.
    """
    initialize()
    cfg = model.cfg
    batch_size = check_option("batch_size", batch_size)
    stored = dtype_of(cache_dtype, model.dtype)
    capacity = capacity_for(cfg, validation.check_length(max(map(len, rows)), cfg.max_position_embeddings))
    each = batch_size or memory.plan_batch(cfg, len(rows), 1, capacity, stored, 0, model.mesh, extra)
    order = list(range(len(rows)))
    if each < len(rows):
        order.sort(key=lambda i: len(rows[i]))
    for first in range(0, len(order), each):
        group, start = order[first : first + each], 0
        batch = memory.round_up_rows(len(group))
        cache = place(model, empty_caches(cfg, batch, capacity, stored, 0)[0])
        for tokens_BT, next_BT, count_B in split_into_chunks([rows[i] for i in group], batch):
            program = f"prefill (batch {batch}, {capacity} tokens)"
            with count_compilations() as compiled, log_slow_compilation(program, compiled):
                cache, values = step(model, cache, tokens_BT, next_BT, count_B)
            yield Chunk(group, start, count_B[: len(group)].tolist(), values)
            start += tokens_BT.shape[1]


def split_into_chunks(
    prompts: Sequence[Sequence[int]], batch: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the prompts chunk by chunk: tokens [B, T], the token after each, and how many of a row are real."""
    longest = max(map(len, prompts))
    size = min(chunk_size(batch), bucket(longest))
    for start in range(0, longest, size):
        tokens_BT, next_BT = np.zeros((batch, size), np.int32), np.zeros((batch, size), np.int32)
        for b, prompt in enumerate(prompts):
            part, after = prompt[start : start + size], prompt[start + 1 : start + size + 1]
            tokens_BT[b, : len(part)], next_BT[b, : len(after)] = part, after
        count_B = np.array([len(prompt[start : start + size]) for prompt in prompts], np.int32)
        yield tokens_BT, next_BT, np.pad(count_B, (0, batch - len(prompts)))


def score_chunk(
    model: Model, cache: Cache, tokens_BT: jax.Array, next_BT: jax.Array, count_B: jax.Array, width: int
) -> tuple[Cache, tuple[jax.Array, jax.Array, jax.Array]]:
    """Return the cache with these tokens, the log-probability [B, T] of the token after each, and the `width` most
    likely ones."""
    h_BTD, cache = model(tokens_BT, cache, count_B)

    def of(h_BTD, next_BT):
        logprob_BTV = jax.nn.log_softmax(model.logits(h_BTD), axis=-1)
        top_BTw, id_BTw = jax.lax.top_k(logprob_BTV, width)
        return jnp.take_along_axis(logprob_BTV, next_BT[..., None], axis=-1)[..., 0], id_BTw, top_BTw

    at_once = max(1, MAX_TEMPORARY // (len(count_B) * model.cfg.vocab_size))
    return cache, map_tokens(of, (h_BTD, next_BT), at_once)


_score_chunk_jit = jax.jit(score_chunk, static_argnames="width", donate_argnames="cache")
