"""Sampling parameters and generation options, each declared once.

A field's metadata holds its `Spec`. Python's checks, `help(generate)` and the command line read it; nothing else lists
the options. This file imports neither JAX nor NumPy, so `--help` can read it at once.
"""

import dataclasses
import inspect
import math
import numbers
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from ..checkpoint.companions import GENERATION, read_sampling
from ..errors import COMMAND_LINE, CheckpointError, UsageError, argument, listing, pluralize, unknown
from ..system.files import expand_path

MAX_BIAS = 1e30
"""Far beyond any logit; a larger bias could not be told from infinity."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """How one option is checked, explained and read from text.

    kind     "count" (an integer), "number", "token_ids", "token_biases", "seed", "strings", "dtype" or "object"; an
             "object" cannot be given on a command line
    metavar  the placeholder in a usage line
    help     one line, in words that suit Python and the command line
    low      the smallest value;  high: the largest one, if it does not depend on the model
    unset    the meaning of None;  none: the word for None on a command line, if it is not the default
    group    "sampling", "length", "batch", "cache" or "python"
    """

    kind: str
    metavar: str
    help: str
    low: float = 0
    high: float = math.inf
    unset: str = ""
    none: str = ""
    group: str = "sampling"


def option(default: Any, kind: str, metavar: str, help: str, **details: Any) -> Any:
    """Return a dataclass field with a default and a Spec."""
    metadata = {"spec": Spec(kind, metavar, help, **details)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata, repr=kind != "object")


def specs(declaration: type) -> dict[str, Spec]:
    """Return the Spec of each field of `Sampling` or `Options`."""
    return {field.name: field.metadata["spec"] for field in dataclasses.fields(declaration)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; the default is greedy. Raises UsageError on values that make no sense.

    `seed` is one for all prompts, or a sequence with one each. In float32 a row's tokens depend on its seed, its
    prompt and its positions alone. In bfloat16 other shapes, of more rows or longer ones, round differently, which can
    flip a near-tie: there that holds of a prompt in a call of its own.
    """

    temperature: float = option(0.0, "number", "X", "0 is greedy; DeepSeek recommends 1 with a top-p of 0.95", high=5)
    top_k: int = option(0, "count", "K", "sample from the K most likely tokens; 0: from all", high=2**31 - 1)
    top_p: float = option(
        1.0, "number", "P", "sample from the fewest tokens whose probabilities add up to P; 1: from all", high=1
    )
    min_p: float = option(
        0.0, "number", "P", "drop tokens less likely than P times the most likely one; 0: none", high=1
    )
    repetition_penalty: float = option(
        1.0, "number", "X", ">1 penalizes tokens already seen, in the prompt too; 1: off", low=0.01, high=100
    )
    presence_penalty: float = option(
        0.0, "number", "X", "subtracted from the logit of every token generated so far", low=-100, high=100
    )
    frequency_penalty: float = option(
        0.0, "number", "X", "subtracted from a token's logit once for each time it was generated", low=-100, high=100
    )
    logit_bias: Mapping[int, float] = option({}, "token_biases", "ID=X", "add X to the logit of a token")
    allowed_ids: Collection[int] | None = option(None, "token_ids", "IDS", "sample only these tokens", unset="all")
    forbidden_ids: Collection[int] = option((), "token_ids", "IDS", "never sample these tokens")
    seed: int | Sequence[int] = option(
        0, "seed", "N", "equal prompts with equal seeds give equal tokens; in bfloat16 if run alone"
    )

    def __post_init__(self):
        for name, spec in specs(Sampling).items():
            object.__setattr__(self, name, check(name, spec, getattr(self, name)))
        if self.top_p == 0:
            raise UsageError(
                f"{argument('top_p')} must be above 0 and at most 1, where 1 keeps all tokens, not {self.top_p!r}"
            )

    @classmethod
    def from_checkpoint(cls, folder: str | Path, **given: Any) -> Self:
        """Return the sampling that the generation_config.json of a checkpoint asks for, greedy if it asks for none,
        changed by the parameters `given`. Raises CheckpointError for a file that cannot be followed, UsageError."""
        cls(**given)
        stored = read_sampling(expand_path(folder))
        try:
            return cls(**{**stored, **given})
        except UsageError as error:
            raise CheckpointError(f"{GENERATION} of {folder}: {error}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `generate`, `stream`, engines and sessions beside prompts and sampling."""

    max_new_tokens: int | None | Sequence[int | None] = option(
        64, "count", "N", "maximum new tokens", unset="as many as the context holds", none="all", group="length"
    )
    min_new_tokens: int = option(0, "count", "N", "at least N new tokens (in a chat: of the answer)", group="length")
    stop_token_ids: Collection[int] = option(
        (), "token_ids", "IDS", "tokens that end a row, beside the model's own end tokens", group="length"
    )
    stop: str | Sequence[str] = option(
        (), "strings", "TEXT", "end a row before this text, in the answer of a chat; needs a tokenizer", group="length"
    )
    n: int = option(
        1, "count", "N", "continuations of each prompt, with consecutive seeds", low=1, high=1024, group="batch"
    )
    top_logprobs: int = option(
        0, "count", "N", "report the N most likely tokens at each position", high=20, group="batch"
    )
    batch_size: int | None = option(
        None, "count", "N", "rows at once", low=1, high=1 << 20, unset="as many as fit in memory", group="batch"
    )
    capacity: int | None = option(
        None, "count", "N", "cached tokens a row, prompt included", low=1, unset="what is needed", group="cache"
    )
    cache_dtype: Any = option(
        None, "dtype", "TYPE", "KV cache storage: bfloat16, float32 or fp8", unset="the compute dtype", group="cache"
    )
    draft: int = option(
        0, "count", "K", "draft K tokens a step with the MTP head; the same result in float32", high=16, group="cache"
    )
    tokenizer: Any = option(
        None, "object", "", "a chat.Tokenizer, or an object with its bytes_of; adds text", unset="none", group="python"
    )
    constraint: Callable[[], Any] | None = option(
        None, "object", "", "makes a row's Constraint: which tokens may come next", unset="none", group="python"
    )
    progress: Callable[[int, int], object] | None = option(
        None, "object", "", "called with (prompt tokens read, of all) during prefill", unset="none", group="python"
    )

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Return Options from keyword arguments. Raises UsageError that names the unknown ones."""
        sampling, known = specs(Sampling), specs(cls)
        if given.keys() <= known.keys():
            return cls(**given)
        wrong = [f"{name} (set it with sampling=Sampling({name}=...))" for name in given if name in sampling]
        wrong += unknown([name for name in given if name not in sampling], known)
        raise UsageError(f"{pluralize(len(wrong), 'unknown option')}: {listing(wrong)}; nothing was run")


def check(name: str, spec: Spec, value: Any, low: float = -math.inf, high: float = math.inf) -> Any:
    """Return `value` in the form that the option `name` takes. `low` and `high` narrow the declared range.

    Raises UsageError that gives the range. Token ids are compared with the vocabulary later, where it is known.
    """
    low, high = max(spec.low, low), min(spec.high, high)
    if value is None and spec.unset:
        return None
    if spec.kind in ("count", "number"):
        number = as_number(value, numbers.Integral if spec.kind == "count" else numbers.Real)
        if number is None or not low <= number <= high:
            what = "an integer" if spec.kind == "count" else "a number"
            limits = f", {low} or more" if high == math.inf else f" from {low} to {high}"
            none = f", or {spec.none if COMMAND_LINE.get() else None}" if spec.none else ""
            raise UsageError(f"{argument(name)} must be {what}{limits}{none}, not {value!r}; nothing was run")
        return number
    if spec.kind == "token_ids" and (isinstance(value, str | bytes) or not isinstance(value, Collection)):
        raise UsageError(f"{argument(name)} must be a list of token ids, not {value!r}")
    if spec.kind == "token_biases" and not (isinstance(value, Mapping) and all(map(_is_bias, value.values()))):
        limits = f"from {-MAX_BIAS:g} to {MAX_BIAS:g}"
        raise UsageError(f"{argument(name)} must map token ids to numbers {limits}, not {value!r}")
    return _check_seed(value) if spec.kind == "seed" else value


def check_option(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> Any:
    """Return `value` in the form that the field `name` of Options takes."""
    return check(name, specs(Options)[name], value, low, high)


def as_number(value: Any, kind: type = numbers.Real) -> Any:
    """Return `value`, Python's or NumPy's, as an int or a float; None unless it is a finite number of this kind."""
    if isinstance(value, bool) or not isinstance(value, kind):
        return None
    try:
        number = int(value) if kind is numbers.Integral else float(value)
    except OverflowError:
        return None
    return number if isinstance(number, int) or math.isfinite(number) else None


def _is_bias(value: Any) -> bool:
    number = as_number(value)
    return number is not None and abs(number) <= MAX_BIAS


def _check_seed(value: Any) -> int | tuple[int, ...]:
    many = isinstance(value, Iterable) and not isinstance(value, str)
    seeds = [as_number(seed, numbers.Integral) for seed in (value if many else [value])]
    if not seeds or any(seed is None or not 0 <= seed < 2**63 for seed in seeds):
        raise UsageError(f"{argument('seed')} must be 0 to 2^63 - 1, or one for each prompt, not {value!r}")
    return tuple(seeds) if many else seeds[0]


def explain(field: dataclasses.Field, none: str = "None", default: Any = None) -> str:
    """Return the help of an option with its `default`, by default its own.

    `none` is the word for None where the reader is, "" where there is none.
    """
    spec: Spec = field.metadata["spec"]
    default = field.default if default is None else default
    if default is None:
        return f"{spec.help} (default: {spec.unset})"
    unset = f"; {none}: {spec.unset}" if spec.unset and none else ""
    return spec.help + unset + (f" (default: {default:g})" if isinstance(default, int | float) else "")


def describe(declaration: type, without: Collection[str] = ()) -> str:
    """Return a table of the options with their help, for a docstring."""
    rows = [(field.name, explain(field)) for field in dataclasses.fields(declaration) if field.name not in without]
    return "\n".join(textwrap.fill(f"{name:<18}  {text}", 100, subsequent_indent=" " * 20) for name, text in rows)


Sampling.__doc__ = f"{inspect.cleandoc(Sampling.__doc__ or '')}\n\n{describe(Sampling)}"
