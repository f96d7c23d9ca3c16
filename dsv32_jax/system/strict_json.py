"""JSON that says one thing: UTF-8, no key twice, no NaN. What several parsers could read differently is refused.

Nor is text read that would take much memory: the objects of Python are up to thirty times as large.
"""

import json
import re
from typing import Any, NamedTuple

from ..errors import CheckpointError, listing

SPACED = re.compile(r'"\s+:')


class Limits(NamedTuple):
    """How many braces, brackets and commas there may be, those in strings too."""

    objects: int
    lists: int
    commas: int


MODEST = Limits(1_000, 10_000, 2_000_000)
"""Enough for every file but the header of a shard."""


def strict_json(text: bytes, limits: Limits = MODEST) -> Any:
    """`text` parsed, by the fast parser, and once more with its slow hooks where a count says that keys may be doubled.

    Without a backslash and space before colons, every `":` follows a key, every key is followed by one, and no string
    holds one. Raises CheckpointError.
    """
    for what, mark, most in zip(Limits._fields, (b"{", b"[", b","), limits, strict=True):
        if (count := text.count(mark)) > most:
            raise CheckpointError(f"not valid here: JSON of {count} {what}, at most {most} are read")
    try:
        decoded = text.decode("utf-8")
        if "\\" not in decoded and "-0" not in decoded and not SPACED.search(decoded):
            parsed = json.loads(decoded, parse_constant=_no_constant)
            if _keys(parsed) == decoded.count('":'):
                return parsed
        return json.loads(decoded, object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not valid JSON: {error}") from None


def _keys(parsed: Any) -> int:
    """How many keys `parsed` and the objects in it have; what is nested deeper is not counted."""
    if not isinstance(parsed, dict):
        return 0
    return len(parsed) + sum(len(value) for value in parsed.values() if type(value) is dict)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        doubled = sorted({key for key in keys if keys.count(key) > 1}) if len(keys) <= 1000 else ["(a large object)"]
        raise ValueError(f"keys that appear twice: {listing(map(ascii, doubled))}")
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"the number {text} is not JSON")


def _integer(text: str) -> int | float:
    """-0 is a float to the safetensors library."""
    return -0.0 if text == "-0" else int(text)
