"""A generation request: validated on the host, once, from the model's config alone; and the shapes it is run in."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ..config import Config
from ..errors import UsageError, argument, pluralize
from ..model import cache, validation
from ..model.model import Model
from .options import Options, Sampling, check, specs
from .sampler import bias_row, check_ids
from .text_stream import StopStrings, require_tokenizer

SMALLEST_BUCKET = 16


@dataclasses.dataclass(frozen=True)
class Request:
    """A validated request.

    `samplings` has one for each row: prompt 0 n times, prompt 1 n times, ... `options` are those given; of them the
    number of new tokens, the end tokens, the capacity and the cache's dtype are resolved here.
    """

    prompts: list[list[int]]
    samplings: list[Sampling]
    options: Options
    max_new_tokens: int
    end_ids: list[int]
    capacity: int
    cache_dtype: np.dtype


def validate(
    cfg: Config,
    prompts: Any,
    sampling: Sampling | Sequence[Sampling] | None = None,
    *,
    dtype: Any,
    tokens: int | None = None,
    **options: Any,
) -> Request:
    """Validate a request for a model with this config, without its weights.

    `dtype` is the compute dtype, `tokens` how many ids stand for a token (default: all of the vocabulary). Raises
    UsageError.
    """
    given = Options.of(options)
    rows = validation.check_prompts(prompts, cfg.vocab_size)
    limits = {
        "capacity": (1, cfg.max_position_embeddings),
        "top_logprobs": (0, min(specs(Options)["top_logprobs"].high, cfg.vocab_size)),
    }
    known = {
        name: check(name, spec, getattr(given, name), *limits.get(name, ())) for name, spec in specs(Options).items()
    }
    given = dataclasses.replace(given, **known)
    if given.draft and not cfg.num_nextn_predict_layers:
        raise UsageError(
            f"{argument('draft', given.draft)} needs the MTP head, which this checkpoint does not have; "
            f"use {argument('draft', 0)}"
        )
    limit, capacity = _fit_context(cfg, max(map(len, rows)), given)
    for name, low, high in (("min_new_tokens", 0, limit), ("batch_size", given.n, None)):
        check(name, specs(Options)[name], getattr(given, name), low, high)
    end_ids = [*cfg.eos_token_id, *check_ids("stop_token_ids", given.stop_token_ids, cfg.vocab_size)]
    samplings = expand_samplings(sampling, len(rows), given.n)
    for one in samplings[:: given.n]:
        _require_choice(bias_row(one, cfg.vocab_size, tokens or cfg.vocab_size), end_ids, given.min_new_tokens)
    _check_text(given)
    stored = cache.dtype_of(given.cache_dtype, dtype)
    return Request(rows, samplings, given, limit, end_ids, capacity, stored)


def validate_for(
    model: Model, prompts: Any, sampling: Sampling | Sequence[Sampling] | None = None, **options: Any
) -> Request:
    """Validate a request for a loaded model."""
    cfg = validation.config_of(model)
    return validate(cfg, prompts, sampling, dtype=model.dtype, tokens=model.origin.tokens, **options)


def _fit_context(cfg: Config, longest: int, options: Options) -> tuple[int, int]:
    """Return how many tokens a row may generate, and the capacity."""
    slots = options.capacity or cfg.max_position_embeddings
    available = slots - longest
    limit = max(available, 0) if options.max_new_tokens is None else options.max_new_tokens
    if limit > available:
        need = longest + limit
        fewer = f"use {argument('max_new_tokens', available)} or less"
        remedies = [fewer if available >= 0 else "shorten the prompt"]
        remedies += [f"use {argument('capacity', need)}"] if need <= cfg.max_position_embeddings else []
        raise UsageError(
            f"the longest prompt has {pluralize(longest, 'token')} and up to {limit} new ones were requested, but a "
            f"row holds {slots}; {' or '.join(remedies)}"
        )
    prefilled = bucket(longest) if longest <= chunk_size() else longest
    return limit, options.capacity or capacity_for(cfg, prefilled + limit)


def expand_samplings(sampling: Any, prompts: int, n: int) -> list[Sampling]:
    """Return one Sampling for each of `n` continuations of each prompt; the i-th has its prompt's seed + i."""
    given = Sampling() if sampling is None else sampling
    each = list(given) if isinstance(given, list | tuple) else [given] * prompts
    for one in each:
        if not isinstance(one, Sampling):
            raise UsageError(f"sampling must be a Sampling(temperature=..., seed=...), or one a prompt, not {one!r}")
    if len(each) != prompts:
        raise UsageError(f"there are {len(each)} samplings for {prompts} prompts; give one for all or one each")
    seeds = [_seed_of(one, i, prompts) for i, one in enumerate(each)]
    return [
        dataclasses.replace(one, seed=(seed + i) % 2**63)
        for one, seed in zip(each, seeds, strict=True)
        for i in range(n)
    ]


def _seed_of(one: Sampling, prompt: int, prompts: int) -> int:
    if isinstance(one.seed, int):
        return one.seed
    if len(one.seed) != prompts:
        raise UsageError(f"there are {len(one.seed)} seeds for {prompts} prompts; give one for all or one each")
    return one.seed[prompt]


def _require_choice(bias_V: np.ndarray, end_ids: list[int], min_new_tokens: int) -> None:
    """Raise UsageError where only end tokens may be sampled and a row may not end yet."""
    others_V = np.isfinite(bias_V)
    others_V[end_ids] = False
    if min_new_tokens and not others_V.any():
        raise UsageError(f"{argument('min_new_tokens', min_new_tokens)}, but only tokens that end a row may be sampled")


def _check_text(options: Options) -> None:
    """Raise UsageError where the stop strings or the tokenizer are none."""
    StopStrings(options.stop)
    if options.tokenizer is not None:
        require_tokenizer(options.tokenizer)
    elif options.stop:
        raise UsageError(
            f"{argument('stop')} is compared with text: give the tokenizer too, or use {argument('stop_token_ids')}"
        )


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


def chunk_size(rows: int = 1) -> int:
    """Return how many tokens of each of `rows` prompts are processed at once; longer ones are prefilled in chunks.

    On accelerators few rows have larger chunks: the weights are read less often, by at least 2,048 tokens.
    """
    return 512 if jax.default_backend() == "cpu" else max(512, 2048 // rows)


def bucket(size: int) -> int:
    """Return the next power of two, at least SMALLEST_BUCKET: many requests share a program of its shape."""
    return max(SMALLEST_BUCKET, 1 << (int(size) - 1).bit_length())


def capacity_for(cfg: Config, tokens: int) -> int:
    """Return the capacity of a cache for rows of `tokens` tokens: a bucket, and at most the model's longest context."""
    return min(bucket(tokens), cfg.max_position_embeddings)
