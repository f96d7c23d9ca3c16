"""Errors that users see, with the exit codes of commands, and the wording of messages."""

import difflib
import errno
import operator
import os
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from contextvars import ContextVar
from typing import Any


class DsvError(Exception):
    """Base class of the errors that this package raises on purpose. `facts`: what a program is told beside them."""

    exit_code = 1
    facts: Mapping[str, object] = {}


class UsageError(DsvError, ValueError):
    """Invalid arguments or options."""

    exit_code = 2


class ConfigError(DsvError, ValueError):
    """config.json does not describe a supported model."""

    exit_code = 3


class CheckpointError(DsvError, ValueError):
    """A checkpoint is damaged, incomplete, or in an unsupported format."""

    exit_code = 3


class VerificationError(DsvError):
    """Bytes differ from the manifest."""

    exit_code = 4


class CapacityError(DsvError):
    """Not enough disk, memory or devices."""

    exit_code = 5


class OutputExistsError(DsvError):
    """The output exists with other content, or another process is writing it."""

    exit_code = 6


class StorageError(DsvError, OSError):
    """Reading or writing failed."""

    exit_code = 74


def kind_of(problems: Iterable[object], kind: type[DsvError]) -> type[DsvError]:
    """Return the class of the error that lists `problems`: StorageError if all are failures of reading, else `kind`."""
    return StorageError if all(isinstance(problem, OSError) for problem in problems) else kind


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_TEXTS = ("RESOURCE_EXHAUSTED", *map(os.strerror, FULL))
"""Messages of the operating system and of TensorStore for a full disk."""


def writing_failed(target: object, error: Exception) -> CapacityError | StorageError:
    """Return the error to raise after `error` while writing `target`."""
    text = str(error)
    if getattr(error, "errno", None) in FULL or any(full in text for full in FULL_TEXTS):
        return CapacityError(
            f"{target} cannot be written: the disk or quota is full, or the file is too large ({_first_line(text)}). "
            "Files completed before it are kept: free some space, then run the same command again to continue"
        )
    return StorageError(
        f"{target} cannot be written: {_first_line(text)}. "
        "Files completed before it are kept; run the same command again to continue"
    )


def explain_exhaustion(error: BaseException) -> CapacityError:
    """Return the error to raise for a MemoryError, or a RuntimeError where the system starts no more threads; any other
    is raised again."""
    if isinstance(error, MemoryError):
        return CapacityError("out of memory")
    if "start new thread" in str(error):
        return CapacityError("the system starts no more threads: raise its limits of processes and memory (ulimit)")
    raise error


def _first_line(text: str) -> str:
    return (text.splitlines() or [""])[0][:300]


def refusal(error: OSError) -> str:
    """Return the message of an error of the operating system, with the file first."""
    if error.filename is None or error.strerror is None:
        return str(error)
    return f"{os.fsdecode(error.filename)}: {error.strerror}"


COMMAND_LINE: ContextVar[bool] = ContextVar("COMMAND_LINE", default=False)
"""Whether messages spell options instead of Python arguments. The command line sets it once."""


def spell_option(name: str) -> str:
    """Return the option of the command line for an argument of Python: its name with hyphens, but `--samples` for `n`,
    as -n is --max-new-tokens."""
    return "--samples" if name == "n" else "--" + name.replace("_", "-")


def argument(name: str, value: object = None) -> str:
    """Spell the argument `name` as the caller types it: `draft=2` in Python, `--draft 2` on the command line.

    Without a value, the name alone. A flag that is True has no value on the command line.
    """
    if COMMAND_LINE.get():
        option = spell_option(name)
        return option if value is None or value is True else f"{option} {value}"
    if value is None:
        return name
    return f'{name}="{value}"' if isinstance(value, str) else f"{name}={value!r}"


def listing(items, limit: int = 8) -> str:
    """Join the first `limit` items by commas, and say how many more there are."""
    items = [str(item) for item in items]
    more = f", ... and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def pluralize(count: int, noun: str, plural: str | None = None) -> str:
    """Return a count with its noun: "1 file", "2 files"."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def require(value: object, kind: type | tuple[type, ...], rule: str) -> None:
    """Raise UsageError with the `rule` unless `value` is an instance of `kind`."""
    if not isinstance(value, kind):
        raise UsageError(f"{rule}, not {value!r:.200}")


def require_integer(name: str, value: object, least: int, most: int | None = None) -> int:
    """Return the argument `name` as an int. Raises UsageError unless it is an integer, not a bool, in the range."""
    number = to_integer(value)
    if number is None or number < least or (most is not None and number > most):
        allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise UsageError(f"{argument(name)} must be an integer {allowed}, not {value!r}; nothing was run")
    return number


def to_integer(value: Any) -> int | None:
    """Return an integer of Python, NumPy or JAX as an int, and None for anything else; a bool is not an integer."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def unknown(given: Iterable[str], known: Collection[str]) -> list[str]:
    """Return the names that are not in `known`, each with the most similar known name."""
    return [name + _similar(name, known) for name in given if name not in known]


SIMILAR = 0.7
"""The similarity of `difflib` from which a name is taken for a misspelling."""


def _similar(name: str, known: Collection[str]) -> str:
    words = {other.lstrip("-"): other for other in known}
    word = name.lower().lstrip("-").partition("=")[0]
    longer = [other for other in words if len(word) > 2 and other.startswith(word)]
    found = longer if len(longer) == 1 else difflib.get_close_matches(word, words, 1, SIMILAR)
    return f" (do you mean {words[found[0]]}?)" if found else ""


ORDINARY = "\n\t\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"
"""Characters of ordinary text that `str.isprintable` rejects."""


def printable(text: str) -> str:
    """Return `text` with every character that could steer a terminal escaped. Line breaks, tabs, joiners and the
    spaces of all scripts stay."""
    return "".join(
        char if char.isprintable() or char in ORDINARY or unicodedata.category(char) == "Zs" else ascii(char)[1:-1]
        for char in text
    )
