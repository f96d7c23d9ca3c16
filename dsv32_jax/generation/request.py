"""A generation request: validated once, on the host, from the model's config; its rows as they grow; its shapes."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ..config import Config
from ..errors import UsageError, argument, pluralize
from ..model import cache, validation
from ..model.model import Model
from .options import Options, Sampling, check_option
from .result import Token, TopLogprobs
from .sampler import bias_row, check_ids
from .text_stream import Detokenizer, StopStrings, require_tokenizer

SMALLEST_BUCKET = 16


@dataclasses.dataclass(frozen=True)
class Request:
    """A validated request.

    prompts         lists of token ids
    samplings       one for each row: prompt 0 n times, prompt 1 n times, ...
    options         as given
    max_new_tokens  the limit of every row;  end_ids: the tokens that end one
    capacity        slots of a row's cache;  cache_dtype: their storage
    """

    prompts: list[list[int]]
    samplings: list[Sampling]
    options: Options
    max_new_tokens: int
    end_ids: list[int]
    capacity: int
    cache_dtype: np.dtype


class Row:
    """The tokens of one row, the `index`-th of its request. `finish_reason` is "stop" after an end token or stop
    string, "length" at the limit, "interrupted" if Ctrl-C came first, and None before."""

    def __init__(self, request: Request, index: int = 0):
        tokenizer, self._request = request.options.tokenizer, request
        prompt = request.prompts[index // request.options.n]
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[TopLogprobs] = []
        self.finish_reason: str | None = None if request.max_new_tokens else "length"
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer, request.options.stop, prompt)
        self._pieces: list[str] = []

    @property
    def text(self) -> str | None:
        """The text so far, without end token and stop string; None without a tokenizer."""
        return None if self._detokenizer is None else "".join(self._pieces)

    def add(self, token: int, logprob: float, top: TopLogprobs = ()) -> Token:
        """Append a token and return it as a stream yields it."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.top.append(top)
        text, is_end = "", token in self._request.end_ids
        if self._detokenizer and not is_end:
            text = self._detokenizer.add([token])
        if is_end or (self._detokenizer and self._detokenizer.has_stopped):
            self.finish_reason = "stop"
        elif len(self.tokens) == self._request.max_new_tokens:
            self.finish_reason = "length"
        if self._detokenizer and self.finish_reason:
            text += self._detokenizer.end()
        self._pieces.append(text)
        return Token(token, logprob, self.finish_reason, text if self._detokenizer else None, top)

    def interrupt(self) -> None:
        """End the row where it is, unless it has ended."""
        if self.finish_reason is None:
            self.finish_reason = "interrupted"
            self._pieces.append(self._detokenizer.end() if self._detokenizer else "")


def validate_for(
    model: Model, prompts: Any, sampling: Sampling | Sequence[Sampling] | None = None, **options: Any
) -> Request:
    """Validate a request for a loaded model. Raises UsageError."""
    cfg = validation.config_of(model)
    return validate(cfg, prompts, sampling, dtype=model.dtype, tokens=model.origin.tokens, **options)


def validate(
    cfg: Config,
    prompts: Any,
    sampling: Sampling | Sequence[Sampling] | None = None,
    *,
    dtype: Any,
    tokens: int | None = None,
    **options: Any,
) -> Request:
    """Validate a request for a model with this config, which need not be loaded. Raises UsageError.

    `dtype` is the compute dtype; `tokens`, how many ids the tokenizer uses (default: the whole vocabulary).
    """
    given = Options.of(options)
    rows = validation.check_prompts(prompts, cfg.vocab_size)
    limits = {"capacity": (1, cfg.max_position_embeddings), "top_logprobs": (0, cfg.vocab_size)}
    given = Options(**{name: check_option(name, value, *limits.get(name, ())) for name, value in vars(given).items()})
    limit, capacity = _fit_context(cfg, max(map(len, rows)), given)
    check_option("min_new_tokens", given.min_new_tokens, 0, limit)
    check_option("batch_size", given.batch_size, given.n)
    if given.draft and not cfg.num_nextn_predict_layers:
        raise UsageError(
            f"{argument('draft', given.draft)} needs the MTP head, which this checkpoint does not have; "
            f"use {argument('draft', 0)}"
        )
    end_ids = [*cfg.eos_token_id, *check_ids("stop_token_ids", given.stop_token_ids, cfg.vocab_size)]
    samplings = expand_samplings(sampling, len(rows), given.n)
    for one in samplings[:: given.n]:
        others_V = np.isfinite(bias_row(one, cfg.vocab_size, tokens or cfg.vocab_size))
        others_V[end_ids] = False
        if given.min_new_tokens and not others_V.any():
            wanted = argument("min_new_tokens", given.min_new_tokens)
            raise UsageError(f"{wanted}, but only tokens that end a row may be sampled")
    _check_text(given)
    return Request(rows, samplings, given, limit, end_ids, capacity, cache.dtype_of(given.cache_dtype, dtype))


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
    seeds = [[one.seed] * prompts if isinstance(one.seed, int) else one.seed for one in each]
    if wrong := [len(some) for some in seeds if len(some) != prompts]:
        raise UsageError(f"there are {wrong[0]} seeds for {prompts} prompts; give one for all or one each")
    return [dataclasses.replace(each[p], seed=(seeds[p][p] + i) % 2**63) for p in range(prompts) for i in range(n)]


def _check_text(options: Options) -> None:
    """Raise UsageError for stop strings or a tokenizer of the wrong kind, and for stop strings without a tokenizer."""
    if options.stop != ():
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
    """Return the next power of two, at least SMALLEST_BUCKET: many requests share the programs of its shape."""
    return max(SMALLEST_BUCKET, 1 << (int(size) - 1).bit_length())


def capacity_for(cfg: Config, tokens: int) -> int:
    """Return the capacity of a cache for rows of `tokens` tokens: a bucket, but no more than the longest context."""
    return min(bucket(tokens), cfg.max_position_embeddings)
