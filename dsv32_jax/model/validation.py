"""Checks of a call's arguments on the host, because JAX would clamp, wrap or overwrite silently.

Each check returns its argument in the form that the model takes; tracers are returned unchecked.
"""

import operator
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from ..config import Config
from ..errors import UsageError, argument, listing, pluralize, require_integer, to_integer
from .cache import Cache

NOT_ROWS = (str, bytes, dict, set, frozenset)
"""Types that have a length but are not lists of token ids."""


def config_of(model: Any) -> Config:
    """Return the config of `model`. Raises UsageError unless it is a Model."""
    cfg = getattr(model, "cfg", None)
    if not isinstance(cfg, Config):
        raise UsageError(f"model must be a Model, as ds.load(folder) returns it, not {model!r:.200}")
    return cfg


def check_token_matrix(tokens: Any, vocab_size: int) -> jax.Array | np.ndarray:
    """Return `tokens` as int32 [B, T]."""
    if isinstance(tokens, Tracer):
        return tokens
    try:
        array = np.asarray(tokens)
    except ValueError:
        lengths = sorted({len(row) for row in tokens if hasattr(row, "__len__")})
        raise UsageError(
            f"tokens must be a matrix, but its rows have {len(lengths)} different lengths ({listing(lengths)}): pad "
            "them on the right with any token, and give the number of real tokens of each row as count_B"
        ) from None
    if array.size and array.dtype.kind not in "iu":
        raise UsageError(f"token ids must be integers, not {array.dtype}; nothing was run")
    if array.ndim != 2 or 0 in array.shape:
        raise UsageError(f"tokens must be a non-empty matrix [rows, tokens], not an array of shape {array.shape}")
    _check_vocabulary([list(row) for row in array], vocab_size)
    return array.astype(np.int32)


def check_prompts(prompts: Any, vocab_size: int) -> list[list[int]]:
    """Return `prompts` as a list of lists of token ids. A flat list of ids is an error, not one prompt."""
    if isinstance(prompts, NOT_ROWS) or not hasattr(prompts, "__len__"):
        kind = type(prompts).__name__
        raise UsageError(f"prompts must be a list of lists of token ids, not a {kind}{_hint_at_ids(prompts)}")
    if not len(prompts):
        raise UsageError("prompts is empty: there is nothing to run")
    rows: list[list[int]] = []
    for b, prompt in enumerate(prompts):
        if isinstance(prompt, NOT_ROWS) or not hasattr(prompt, "__len__"):
            raise UsageError(f"prompt {b} must be a list of token ids, not {prompt!r:.200}{_hint_at_ids(prompt)}")
        if not len(prompt):
            raise UsageError(f"prompt {b} is empty: it needs at least the beginning-of-sentence token")
        rows.append([_token_id(token, b, t) for t, token in enumerate(prompt)])
    _check_vocabulary(rows, vocab_size)
    return rows


def _hint_at_ids(given: Any) -> str:
    """Return what to write instead of text or of a single id."""
    if isinstance(given, str):
        return "; text becomes token ids by ds.chat.prepare(text, tokenizer).ids"
    return "; one prompt is written [[0, 17, 42]]" if to_integer(given) is not None else ""


def _token_id(token: Any, row: int, position: int) -> int:
    try:
        if not isinstance(token, bool):
            return operator.index(token)
    except TypeError:
        pass
    raise UsageError(f"prompt {row} has {token!r} at position {position}; token ids must be integers")


def _check_vocabulary(rows: list[list[int]], vocab_size: int) -> None:
    outside = [
        f"{token} (row {b}, position {t})"
        for b, row in enumerate(rows)
        for t, token in enumerate(row)
        if not 0 <= token < vocab_size
    ]
    if outside:
        raise UsageError(
            f"{pluralize(len(outside), 'token id')} outside the vocabulary of 0..{vocab_size - 1}: "
            f"{listing(outside, 5)}; nothing was run"
        )


def check_counts(count_B: Any, batch: int, new: int) -> jax.Array | np.ndarray:
    """Return `count_B`, the number of real tokens among the `new` ones of each row, as int32 [B]."""
    if isinstance(count_B, Tracer):
        return count_B
    array = np.asarray(count_B)
    if array.shape != (batch,) or array.dtype.kind not in "iu" or array.min() < 1 or array.max() > new:
        raise UsageError(
            f"count_B must give the number of real tokens, from 1 to {new}, of each of {pluralize(batch, 'row')}, "
            f"not {count_B}"
        )
    return array.astype(np.int32)


def check_length(tokens: int, longest: int) -> int:
    """Return `tokens`, the length of a row, unless it exceeds the longest context."""
    if tokens > longest:
        raise UsageError(f"a row has {tokens} tokens, but the model's longest context is {longest}; nothing was run")
    return tokens


def check_capacity(capacity: Any, count_B: Any, longest: int) -> int:
    """Return `capacity` if it holds the new tokens of every row and does not exceed the longest context."""
    needed = 1 if isinstance(count_B, Tracer) else int(np.max(count_B))
    slots = require_integer("capacity", capacity, 1, longest)
    if slots < needed:
        raise UsageError(
            f"capacity is {slots}, but a row has {needed} tokens; use {argument('capacity', needed)} or more"
        )
    return slots


def check_room(cache: Cache, count_B: jax.Array | np.ndarray) -> None:
    """Raise UsageError unless the cache has as many rows as `count_B`, with room for that many tokens each."""
    if isinstance(count_B, Tracer) or isinstance(cache.length_B, Tracer):
        return
    if cache.length_B.shape != count_B.shape:
        raise UsageError(
            f"the cache has {pluralize(len(cache.length_B), 'row')}, but there are "
            f"{pluralize(len(count_B), 'row')} of tokens"
        )
    needed = np.asarray(cache.length_B) + np.asarray(count_B)
    if (full := np.flatnonzero(needed > cache.capacity)).size:
        raise UsageError(
            f"the cache holds {cache.capacity} tokens a row, but {pluralize(full.size, 'row')} would exceed it (row "
            f"{full[0]}: {needed[full[0]]}); allocate one with {argument('capacity', int(needed.max()))}. Nothing was "
            "run, and the cache is unchanged"
        )
