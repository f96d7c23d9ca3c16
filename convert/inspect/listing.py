"""Single tensors of a folder, chosen by a pattern: what they are, where they lie, and what is in them."""

import fnmatch
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsv32_jax.checkpoint.arrays import FOLDER
from dsv32_jax.checkpoint.manifest import Manifest, is_converted
from dsv32_jax.errors import CheckpointError, UsageError, listing
from dsv32_jax.system.paths import path_of

from ..read import weights
from ..read.detect import detect
from ..read.header import Tensor
from ..read.source import Source
from ..read.stored import Stored
from ..verify.converted import Converted, Group, nbytes_of, raise_damaged
from .value_statistics import Tally


def tensors(folder: str | Path, pattern: str) -> list[dict[str, Any]]:
    """The tensors (in a converted folder: arrays) whose names match the shell pattern: name, dtype, shape, bytes, and
    place. Raises UsageError where none does.
    """
    folder = path_of(folder).absolute()
    found = list(_arrays(folder, pattern) if is_converted(folder) else _tensors(folder, pattern))
    if not found:
        raise _nothing(folder, pattern)
    return found


def statistics(folder: str | Path, pattern: str) -> Iterator[dict[str, Any]]:
    """The statistics of every weight (in a converted folder: leaf) whose name, or a tensor of which, matches.

    Raises UsageError where none does.
    """
    folder, found = path_of(folder).absolute(), False
    for row in _of_leaves(folder, pattern) if is_converted(folder) else _of_weights(folder, pattern):
        found = True
        yield row
    if not found:
        raise _nothing(folder, pattern)


def _nothing(folder: Path, pattern: str) -> UsageError:
    names = list(Manifest.read(folder).leaves if is_converted(folder) else Source(folder).tensors)
    some = listing(names[len(names) // 3 :: len(names) // 3 + 1], 3)
    return UsageError(f"no tensor of {folder} is called {pattern}. Names there are like {some}; quote the pattern")


def _tensors(folder: Path, pattern: str) -> Iterator[dict[str, Any]]:
    for name, tensor in Source(folder).tensors.items():
        if fnmatch.fnmatchcase(name, pattern):
            yield _row(name, tensor.dtype, tensor.shape, tensor.nbytes, tensor.file.name)


def _arrays(folder: Path, pattern: str) -> Iterator[dict[str, Any]]:
    converted = Converted(folder)
    for key, entry in converted.expected.items():
        name = ".".join(key)
        if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(key[0], pattern):
            info = converted.arrays.stored.get(key)
            place = "missing" if info is None else f"{FOLDER}/{info.part}"
            yield _row(name, entry.dtype, entry.shape, nbytes_of(entry), place)


def _row(name: str, dtype: str, shape: tuple[int, ...], nbytes: int, place: str) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape), "bytes": nbytes, "place": place}


def _of_weights(folder: Path, pattern: str) -> Iterator[dict[str, Any]]:
    """Of a Hugging Face folder."""
    source = Source(folder)
    seen: set[str] = set()
    for name in source.tensors:
        if not fnmatch.fnmatchcase(name, pattern):
            continue
        stored = _stored(name, source.tensors)
        if stored is None or stored.name in seen:
            continue
        seen.add(stored.name)
        tally = Tally()
        tally.add(weights.load(stored, source.read))
        yield {"name": stored.name, "format": stored.format, "shape": list(stored.shape), **tally.result()}


def _stored(name: str, found: dict[str, Tensor]) -> Stored | None:
    """The weight that the tensor `name` belongs to, None where it belongs to none that is read."""
    base = name[: name.rfind("weight") + len("weight")] if ".weight" in name else name
    try:
        return detect(base, found)
    except CheckpointError:
        return None


def _of_leaves(folder: Path, pattern: str) -> Iterator[dict[str, Any]]:
    """Of a converted folder. Raises VerificationError where an array that was read has changed."""
    converted = Converted(folder)
    for group in converted.groups:
        chosen = [i for i, leaf in enumerate(group.leaves) if _matches(converted, leaf.path, pattern)]
        if chosen:
            yield from _of_group(converted, group, chosen)


def _matches(converted: Converted, path: str, pattern: str) -> bool:
    names = [path, *(f"{path}.{name}" for name in converted.manifest.leaves[path].arrays)]
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _of_group(converted: Converted, group: Group, chosen: list[int]) -> Iterator[dict[str, Any]]:
    tallies = {i: Tally() for i in chosen}
    for _, parts in converted.read(group, raise_damaged):
        for i in chosen:
            tallies[i].add({name: np.ascontiguousarray(array) for name, array in parts[i].items()})
    for i, tally in tallies.items():
        leaf, entry = group.leaves[i], group.weights[0].entries[i]
        yield {"name": leaf.path, "format": entry.format, "shape": list(leaf.shape), **tally.result()}
