"""A generation request: validated once, on the host, from the model's config."""

import dataclasses
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import numpy as np

from ..config import Config
from ..errors import UsageError, argument, pluralize
from ..model import cache, validation
from ..model.model import Model
from .detokenizer import THINK, THINK_END, StopStrings, read_tag, require_tokenizer
from .options import Options, Sampling, check_option, describe, specs
from .pages import PAGE
from .programs import capacity_for
from .sampler import bias_row, check_ids

Function = TypeVar("Function", bound=Callable[..., Any])

CACHE_OPTIONS = tuple(name for name, spec in specs(Options).items() if spec.group == "cache")
"""Options that an engine or a session has for all its rows."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A validated request.

    prompts         lists of token ids
    samplings       one for each row: prompt 0 n times, prompt 1 n times, ...
    options         as given
    limits          the most new tokens of each row;  end_ids: the tokens that end one
    thoughts_ends   of each prompt, the token that ends the thoughts which it opens; -1 where nothing depends on that
    capacity        slots of a row's cache;  cache_dtype: their storage
    """

    prompts: list[list[int]]
    samplings: list[Sampling]
    options: Options
    limits: list[int]
    end_ids: list[int]
    thoughts_ends: list[int]
    capacity: int
    cache_dtype: np.dtype


def accepts_options(*, without: Collection[str] = ()) -> Callable[[Function], Function]:
    """Decorate a function with `**options`: its signature and docstring list every field of Options but `without`.

    The signature has no annotations, with which `help` shows a line of 800 characters.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [p.replace(annotation=p.empty) for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
        listed = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default)
            for f in dataclasses.fields(Options)
            if f.name not in without
        ]
        function.__signature__ = signature.replace(parameters=[*own, *listed])  # type: ignore[attr-defined]
        function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nOptions:\n\n{describe(Options, without)}"
        return function

    return decorate


def validate_for(
    model: Model, prompts: Any, sampling: Sampling | Sequence[Sampling] | None = None, **options: Any
) -> Request:
    """Validate a request for a loaded model. Raises UsageError."""
    cfg = validation.config_of(model)
    return validate(cfg, prompts, sampling, dtype=model.dtype, tokens=model.origin.tokens, **options)


def validate_for_owner(owner: Any, prompt: Any, sampling: Any, options: dict[str, Any]) -> Request:
    """Validate the request for a prompt in an Engine or Session, which has a model and CACHE_OPTIONS. Raises
    UsageError."""
    if given := [name for name in CACHE_OPTIONS if name in options]:
        kind = type(owner).__name__.lower()
        raise UsageError(f"{argument(given[0])} belongs to the {kind}: give it to ds.{kind}(...)")
    own = {name: getattr(owner, name) for name in CACHE_OPTIONS}
    return validate_for(owner.model, [prompt], sampling, **options, **own)


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
    wanted = _check_limits(given.max_new_tokens, len(rows))
    one_for_all = {name: value for name, value in vars(given).items() if name != "max_new_tokens"}
    checked = {name: check_option(name, value, *limits.get(name, ())) for name, value in one_for_all.items()}
    given = dataclasses.replace(given, **checked)
    most, capacity = _fit_context(cfg, [len(row) for row in rows], wanted, given.capacity)
    check_option("min_new_tokens", given.min_new_tokens, 0, min(most))
    require_drafts(cfg, given.draft)
    if given.constraint and given.min_new_tokens:
        other = argument("min_new_tokens", given.min_new_tokens)
        raise UsageError(f"{other} cannot be used with a constraint, which says when a row may end; leave one out")
    end_ids = [*cfg.eos_token_id, *check_ids("stop_token_ids", given.stop_token_ids, cfg.vocab_size)]
    samplings = expand_samplings(sampling, len(rows), given.n)
    for one in samplings[:: given.n]:
        others_V = np.isfinite(bias_row(one, cfg.vocab_size, tokens or cfg.vocab_size))
        others_V[end_ids] = False
        if given.min_new_tokens and not others_V.any():
            wanted = argument("min_new_tokens", given.min_new_tokens)
            raise UsageError(f"{wanted}, but only tokens that end a row may be sampled")
    _check_text(given)
    each = [limit for limit in most for _ in range(given.n)]
    thoughts = [_find_thoughts_end(given, row, cfg.vocab_size) for row in rows]
    stored = cache.dtype_of(given.cache_dtype, dtype)
    return Request(rows, samplings, given, each, end_ids, thoughts, capacity, stored)


def require_drafts(cfg: Config, draft: int) -> None:
    """Raise UsageError if tokens are to be drafted and the model has no MTP head."""
    if draft and not cfg.num_nextn_predict_layers:
        raise UsageError(
            f"{argument('draft', draft)} needs the MTP head, which this model does not have; use {argument('draft', 0)}"
        )


def require_one_row(request: Request) -> None:
    """Raise UsageError if the request of a stream has several continuations."""
    if request.options.n != 1:
        raise UsageError(f"a stream has one row, not {argument('n', request.options.n)}; use generate")


def _check_limits(given: Any, prompts: int) -> list[int | None]:
    """Return the most new tokens of each prompt, None for as many as the context holds."""
    each = list(given) if isinstance(given, list | tuple) else [given] * prompts
    if len(each) != prompts:
        name = argument("max_new_tokens")
        raise UsageError(f"{name} has {len(each)} values for {prompts} prompts; give one for all or one each")
    return [check_option("max_new_tokens", one) for one in each]


def _fit_context(
    cfg: Config, lengths: Sequence[int], wanted: Sequence[int | None], capacity: int | None
) -> tuple[list[int], int]:
    """Return how many tokens each row may generate, and the capacity."""
    slots = capacity or cfg.max_position_embeddings
    limits = [max(slots - length, 0) if limit is None else limit for length, limit in zip(lengths, wanted, strict=True)]
    need, longest, limit = max((length + limit, length, limit) for length, limit in zip(lengths, limits, strict=True))
    available = slots - longest
    if limit > available:
        fewer = f"use {argument('max_new_tokens', available)} or less"
        remedies = [fewer if available >= 0 else "shorten the prompt"]
        remedies += [f"use {argument('capacity', need)}"] if need <= cfg.max_position_embeddings else []
        raise UsageError(
            f"the longest prompt has {pluralize(longest, 'token')} and up to {limit} new ones were requested, but a "
            f"row holds {slots}; {' or '.join(remedies)}"
        )
    return limits, capacity or capacity_for(cfg, max(need, PAGE))


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


def _find_thoughts_end(options: Options, prompt: Sequence[int], vocab_size: int) -> int:
    """Return the token that ends thoughts where `min_new_tokens` counts from there, otherwise -1."""
    if not options.min_new_tokens or options.tokenizer is None or read_tag(options.tokenizer, prompt) != THINK:
        return -1
    wanted = THINK_END.encode()
    found = (token for token in range(vocab_size) if options.tokenizer.bytes_of([token]) == wanted)
    if (end := next(found, None)) is None:
        raise UsageError(f"{argument('min_new_tokens')} counts from {THINK_END}, and the tokenizer has no such token")
    return end
