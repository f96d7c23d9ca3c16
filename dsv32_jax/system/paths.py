"""Paths as a user writes them."""

import os
from pathlib import Path

from ..errors import UsageError


def path_of(path: str | os.PathLike[str]) -> Path:
    """`path` with ~ and ~user replaced by that home. Raises UsageError where there is no such user, or no such name."""
    try:
        found = Path(path).expanduser()
    except TypeError:
        raise UsageError(f"a path is text or a Path, not {path!r:.200}") from None
    except RuntimeError as error:
        raise UsageError(f"{str(path)!r} is no path here: {error}") from None
    if not os.fspath(path):
        raise UsageError("a path is empty: name a folder, or . for the current one")
    if "\0" in str(found):
        raise UsageError(f"{str(path)!r} is no path: it holds a zero byte")
    try:
        str(found).encode()
    except UnicodeEncodeError:
        raise UsageError(f"{str(path)!r} is no path here: its bytes are not UTF-8, which checkpoints need") from None
    return found


def file_of(path: str | os.PathLike[str]) -> Path:
    """The same, of a file, there or not. Raises UsageError where it is a folder too."""
    if (found := path_of(path)).is_dir():
        raise UsageError(f"{found} is a folder; give the name of a file")
    return found
