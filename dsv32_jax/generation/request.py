"""A generation request: checked on the host, and rounded up to shapes that many requests share."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np

from ..errors import UsageError, argument, require_integer, to_integer
from ..model import cache, validation
from ..model.model import Model
from ..system.compilation import initialize
from . import memory
from .options import Sampling
from .prefill_decode import Task
from .sampling_params import bias, knobs, of_rows, token_ids

SMALLEST_BUCKET = 16
CHUNK = 512
"""Tokens of a prompt that are processed at once: longer prompts are read chunk by chunk, with one program."""

MOST_TOP_LOGPROBS = 20
MOST_DRAFTS = 16


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked request. `samplings` has one for each row: prompt 0 n times, prompt 1 n times, ..."""

    prompts: list[list[int]]
    samplings: list[Sampling]
    limit: int
    least: int
    ends: list[int]
    capacity: int
    cache_dtype: np.dtype
    n: int
    top_logprobs: int
    draft: int
    batch_size: int

    @property
    def groups(self) -> list[list[int]]:
        """The prompts that are continued together: alike in length, as many as `batch_size` allows."""
        order = sorted(range(len(self.prompts)), key=lambda i: len(self.prompts[i]))
        each = max(1, self.batch_size // self.n)
        return [order[start : start + each] for start in range(0, len(order), each)]


def plan(
    model: Model,
    prompts: Any,
    sampling: Sampling | Sequence[Sampling] | None = None,
    *,
    max_new_tokens: int | None = 64,
    min_new_tokens: int = 0,
    stop_token_ids: Collection[int] = (),
    n: int = 1,
    top_logprobs: int = 0,
    draft: int = 0,
    cache_dtype: Any = None,
    capacity: int | None = None,
    batch_size: int | None = None,
) -> Request:
    """Check a request and choose its shapes; nothing is compiled here."""
    initialize()
    cfg = validation.config_of(model)
    rows = validation.check_prompts(prompts, cfg.vocab_size)
    n = require_integer("n", n, 1, 1024)
    top_logprobs = require_integer("top_logprobs", top_logprobs, 0, min(MOST_TOP_LOGPROBS, cfg.vocab_size))
    draft = require_integer("draft", draft, 0, MOST_DRAFTS)
    if draft and model.mtp is None:
        raise UsageError(
            f"draft={draft} needs the drafting layer (MTP), which this checkpoint does not have; use draft=0"
        )
    limit, capacity = _room(model, max(map(len, rows)), max_new_tokens, capacity)
    min_new_tokens = require_integer("min_new_tokens", min_new_tokens, 0, limit)
    stored = cache.dtype_of(cache_dtype, model.dtype)
    samplings = of_rows(sampling, len(rows), n)
    ends = [*cfg.eos_token_id, *token_ids("stop_token_ids", stop_token_ids, cfg.vocab_size)]
    for one in samplings[::n]:
        _require_choice(bias(one, cfg.vocab_size, used(model)), ends, min_new_tokens)
    if batch_size is not None:
        batch_size = require_integer("batch_size", batch_size, n, 1 << 20)
    return Request(
        rows,
        samplings,
        limit,
        min_new_tokens,
        ends,
        capacity,
        stored,
        n,
        top_logprobs,
        draft,
        batch_size or memory.plan_batch(cfg, len(rows) * n, n, capacity, stored, draft, model.mesh),
    )


def _room(model: Model, longest: int, max_new_tokens: Any, capacity: Any) -> tuple[int, int]:
    """How many tokens a row may make, and the capacity."""
    largest = model.cfg.max_position_embeddings
    slots = None if capacity is None else to_integer(capacity) or 0
    if slots is not None and not 1 <= slots <= largest:
        raise UsageError(f"capacity must be an integer from 1 to max_position_embeddings ({largest}), not {capacity!r}")
    available = (slots or largest) - longest
    limit = max(available, 0) if max_new_tokens is None else to_integer(max_new_tokens)
    if limit is None or limit < 0:
        raise UsageError(f"max_new_tokens must be a whole number, 0 or more, or None, not {max_new_tokens!r}")
    if limit > available:
        need = longest + limit
        remedies = (
            [f"use {argument('max_new_tokens', available)} or less"] if available >= 0 else ["shorten the prompt"]
        )
        remedies += [f"use {argument('capacity', need)}"] if need <= largest else []
        raise UsageError(
            f"the longest prompt has {longest} tokens and {limit} new ones are asked for, but a row holds "
            f"{available + longest}; {' or '.join(remedies)}"
        )
    read = bucket(longest) if longest <= CHUNK else longest
    return limit, slots or bucket(read + limit)


def _require_choice(bias_V: np.ndarray, ends: list[int], least: int) -> None:
    """Before the first `least` tokens are made there is something else to choose than an end token."""
    others_V = np.isfinite(bias_V)
    others_V[ends] = False
    if least and not others_V.any():
        raise UsageError(f"min_new_tokens={least}, but only tokens that end a row may be chosen")


def used(model: Model) -> int:
    """How many ids stand for a token: those of the checkpoint's tokenizer, or of the vocabulary without one."""
    return model.origin.tokens or model.cfg.vocab_size


def task(model: Model, request: Request, rows: Sequence[int], batch: int) -> Task:
    """What the given rows of the request want, and nothing for the rows that fill up the batch."""
    vocab_size = model.cfg.vocab_size
    samplings = [request.samplings[row] for row in rows] + [Sampling()] * (batch - len(rows))
    end_BV = np.zeros((batch, vocab_size), bool)
    end_BV[:, request.ends] = True
    most_B = np.zeros(batch, np.int32)
    most_B[: len(rows)] = request.limit
    return Task(
        knobs(samplings, vocab_size, used(model)),
        jax.device_put(end_BV),
        jax.device_put(np.full(batch, request.least, np.int32)),
        jax.device_put(most_B),
    )


def occurring(prompts: Sequence[Sequence[int]], batch: int, vocab_size: int) -> np.ndarray:
    """Which tokens occur in the prompt of each row, [B, V] bool."""
    found_BV = np.zeros((batch, vocab_size), bool)
    for row_V, prompt in zip(found_BV, prompts, strict=False):
        row_V[list(prompt)] = True
    return found_BV


def chunks(prompts: Sequence[Sequence[int]], batch: int):
    """The prompts CHUNK tokens at a time: (tokens [B, T], the token after each, how many are real)."""
    longest = max(map(len, prompts))
    size = min(CHUNK, bucket(longest))
    for start in range(0, longest, size):
        tokens_BT, next_BT = np.zeros((batch, size), np.int32), np.zeros((batch, size), np.int32)
        for b, prompt in enumerate(prompts):
            part, after = prompt[start : start + size], prompt[start + 1 : start + size + 1]
            tokens_BT[b, : len(part)], next_BT[b, : len(after)] = part, after
        count_B = np.array([len(prompt[start : start + size]) for prompt in prompts], np.int32)
        yield tokens_BT, next_BT, np.pad(count_B, (0, batch - len(prompts)))


def bucket(size: int) -> int:
    """The next power of two, at least SMALLEST_BUCKET."""
    return max(SMALLEST_BUCKET, 1 << (int(size) - 1).bit_length())
