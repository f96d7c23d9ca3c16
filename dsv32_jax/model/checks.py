"""Misuse, caught on the host: JAX would clamp, wrap or overwrite in silence. Values that are traced pass unseen."""

import numbers
import operator
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from ..config import Config
from ..errors import UsageError, listing
from .cache import Cache

UNORDERED = (str, bytes, dict, set, frozenset)
"""What has a length and is no list of token ids."""


def config_of(model: Any) -> Config:
    """The config of `model`, where that is a Model."""
    cfg = getattr(model, "cfg", None)
    if not isinstance(cfg, Config):
        raise UsageError(f"model must be what ds.load(folder) gives, not {model!r:.200}")
    return cfg


def token_matrix(tokens: Any, vocab_size: int) -> jax.Array | np.ndarray:
    """`tokens` as int32 [B, T]."""
    if isinstance(tokens, Tracer):
        return tokens
    try:
        array = np.asarray(tokens)
    except ValueError:
        lengths = sorted({len(row) for row in tokens if hasattr(row, "__len__")})
        raise UsageError(
            f"tokens must be a matrix, but its rows are of {len(lengths)} lengths ({listing(lengths)}): fill them up "
            "on the right with any token, and say in count_B how many of each row are real"
        ) from None
    if array.size and array.dtype.kind not in "iu":
        raise UsageError(f"token ids must be whole numbers, not {array.dtype}; nothing was run")
    if array.ndim != 2 or 0 in array.shape:
        raise UsageError(
            f"tokens must be a matrix [rows, tokens] with at least one of each, not of shape {array.shape}"
        )
    _in_vocabulary([list(row) for row in array], vocab_size)
    return array.astype(np.int32)


def prompts(rows: Any, vocab_size: int) -> list[list[int]]:
    """`rows`, a list of lists of token ids, checked; a flat list of ids is refused rather than guessed at."""
    if isinstance(rows, UNORDERED) or not hasattr(rows, "__len__"):
        raise UsageError(f"prompts must be a list of lists of token ids, not a {type(rows).__name__}")
    if not len(rows):
        raise UsageError("prompts is empty: there is nothing to run")
    checked: list[list[int]] = []
    for b, row in enumerate(rows):
        if isinstance(row, UNORDERED) or not hasattr(row, "__len__"):
            raise UsageError(f"prompt {b} must be a list of token ids, not {row!r}")
        if not len(row):
            raise UsageError(f"prompt {b} is empty: give it at least the beginning-of-sentence token")
        checked.append([_token_id(token, b, t) for t, token in enumerate(row)])
    _in_vocabulary(checked, vocab_size)
    return checked


def _token_id(token: Any, row: int, position: int) -> int:
    if isinstance(token, bool | np.bool_):
        raise UsageError(f"prompt {row} holds {token!r} at position {position}; token ids are whole numbers")
    try:
        return operator.index(token)
    except TypeError:
        raise UsageError(f"prompt {row} holds {token!r} at position {position}; token ids are whole numbers") from None


def _in_vocabulary(rows: list[list[int]], vocab_size: int) -> None:
    wrong = [
        f"{token} (row {b}, position {t})"
        for b, row in enumerate(rows)
        for t, token in enumerate(row)
        if not 0 <= token < vocab_size
    ]
    if wrong:
        raise UsageError(
            f"{len(wrong)} token ids are outside the vocabulary of 0..{vocab_size - 1}: {listing(wrong, 5)}; "
            "nothing was run"
        )


def counts(count_B: Any, batch: int, new: int) -> jax.Array | np.ndarray:
    """`count_B` as int32 [B]."""
    if isinstance(count_B, Tracer):
        return count_B
    array = np.asarray(count_B)
    if array.shape != (batch,) or array.dtype.kind not in "iu" or array.min() < 1 or array.max() > new:
        raise UsageError(
            f"count_B must hold, for each of {batch} rows, how many of {new} tokens are real, not {count_B}"
        )
    return array.astype(np.int32)


def length(tokens: int, most: int) -> int:
    """`tokens`, where a row may be as long."""
    if tokens > most:
        raise UsageError(f"a row has {tokens} tokens, but the model's longest context is {most}; nothing was run")
    return tokens


def whole(name: str, value: Any, least: int, most: int) -> int:
    """`value`, a whole number in the range."""
    found = as_whole(value)
    if found is None or not least <= found <= most:
        raise UsageError(f"{name} must be a whole number from {least} to {most}, not {value!r}; nothing was run")
    return found


def as_whole(value: Any) -> int | None:
    """`value`, Python's or NumPy's, as an int; None where it is no whole number."""
    return None if isinstance(value, bool) or not isinstance(value, numbers.Integral) else int(value)


def capacity(slots: Any, count_B: Any, longest: int) -> int:
    """`slots`, where it is a size that holds the new tokens of every row, and at most the model's longest context."""
    need = 1 if isinstance(count_B, Tracer) else int(np.max(count_B))
    found = whole("capacity", slots, 1, longest)
    if found < need:
        raise UsageError(f"capacity is {slots!r}, but a row has {need} tokens; use capacity={need} or more")
    return found


def room(cache: Cache, count_B: jax.Array | np.ndarray) -> None:
    """The new tokens fit in the cache and the cache has a row for each."""
    if isinstance(count_B, Tracer) or isinstance(cache.length_B, Tracer):
        return
    if cache.length_B.shape != count_B.shape:
        raise UsageError(f"the cache has {len(cache.length_B)} rows, but there are {len(count_B)} rows of tokens")
    need = np.asarray(cache.length_B) + np.asarray(count_B)
    if (over := np.flatnonzero(need > cache.capacity)).size:
        raise UsageError(
            f"the cache holds {cache.capacity} tokens a row, but {over.size} rows need more (row {over[0]}: "
            f"{need[over[0]]}); make one with capacity={int(need.max())}. Nothing was run and the cache is as it was"
        )
