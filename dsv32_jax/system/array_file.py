"""Named arrays and facts about them in one safetensors file, which holds the SHA-256 of both."""

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..errors import CapacityError, CheckpointError, StorageError, listing, pluralize, writing_failed
from . import host
from .files import Schema, find_mismatches, hash_chunks, replace_file, require_regular
from .progress import format_size


def write_arrays(file: Path, kind: str, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write a file of this `kind`, a name with a version, whole or not at all. Raises CapacityError, StorageError."""
    about = {"kind": kind, "facts": json.dumps(facts)}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    try:
        with replace_file(file) as new:
            save_file(dict(arrays), new, {**about, "sha256": _hash(about["facts"], arrays)})
    except (SafetensorError, OSError) as error:
        raise writing_failed(file, error) from error


class Header(NamedTuple):
    """The dtype of an array in a file, F32 for example, and its shape."""

    dtype: str
    shape: tuple[int, ...]


def read_arrays(
    file: Path,
    kind: str,
    form: Schema,
    find_problems: Callable[[Mapping[str, Any], Mapping[str, Header]], list[str]] = lambda facts, headers: [],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the facts and arrays that `write_arrays` was given, facts of this `form`.

    Arrays are read if they fit in memory and `find_problems` finds none in facts and headers. Raises CheckpointError if
    the file is of another kind or not what was written, CapacityError, StorageError if it is unreadable.
    """
    noun = kind.split()[1]
    try:
        with safe_open(require_regular(file), "numpy") as opened:
            about = opened.metadata() or {}
            if about.get("kind") != kind:
                found = f"but {about['kind']!r:.100}" if "kind" in about else "nor says what it is"
                raise CheckpointError(f"{file} is not a {noun} of this version ({kind}), {found}")
            facts = json.loads(about["facts"])
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            headers = {name: Header(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
            if problems := find_mismatches(facts, form, noun) or find_problems(facts, headers):
                count = pluralize(len(problems), "problem")
                raise CheckpointError(f"{file} is damaged ({count}): {listing(problems)}")
            _require_room(file)
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}
            if about["sha256"] != _hash(about["facts"], arrays):
                raise CheckpointError(f"{file} is damaged: its bytes are not those that were written")
    except FileNotFoundError:
        raise CheckpointError(f"there is no {file}; nothing was read") from None
    except OSError as error:
        raise StorageError(f"{file} cannot be read: {error.strerror}") from error
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} is not a {noun}: {error}") from error
    return facts, arrays


def _require_room(file: Path) -> None:
    """Raise CapacityError if the arrays of a file, which are no larger than the file, do not fit in memory."""
    needed, free = file.stat().st_size, host.get_free_memory()
    if needed > free:
        raise CapacityError(f"{file} takes {format_size(needed)}, but {format_size(free)} are free; nothing was read")


def _hash(facts: str, arrays: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of facts and of all names, dtypes, shapes and bytes."""
    named = ((f"{name} {array.dtype} {array.shape}".encode(), array.data) for name, array in sorted(arrays.items()))
    return hash_chunks(itertools.chain([facts.encode()], *named))
