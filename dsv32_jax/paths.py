"""Paths as a user writes them."""

import os
from pathlib import Path

from .errors import UsageError


def path_of(path: str | os.PathLike[str]) -> Path:
    """`path` with ~ and ~user replaced by that home. Raises UsageError where there is no such user, or no such name."""
    try:
        found = Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{str(path)!r} is no path here: {error}") from None
    if "\0" in str(found):
        raise UsageError(f"{str(path)!r} is no path: it holds a zero byte")
    return found
