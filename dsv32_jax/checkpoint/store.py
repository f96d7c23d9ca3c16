"""Arrays on disk: this file and `orbax_habits` are the only ones that know Orbax.

FOLDER/weights holds one Orbax checkpoint for each part (a group of consecutive leaves), a nested dict of arrays keyed
by the pieces of the leaf's path and the component's name: {"layers": {"3": {"mla": {"w_uq_HNQ": {"codes": ...}}}}}.
A part appears whole or not at all. Parts are independent because the cost of a save into, and of the finalization of,
one growing Orbax checkpoint rises with the square of what is already there (60 saves of 36 arrays: 60 ms for the
first, 1.7 s for the fiftieth, 17 s to finalize; as parts: 80 ms each).
"""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from ..errors import CheckpointError, listing, writing_failed
from . import chunks
from .arrays import FOLDER, UNFINISHED, Arrays, Key, dtype_of
from .manifest import sync_folder
from .orbax_patches import chunk_shapes_as_given, collect_leftovers, hide_leftovers, quiet, written_in_bands

Piece = Callable[[Key, tuple[int, ...]], tuple[int, ...]]
"""The shape of what one device holds of the array of that key and shape."""


def whole(key: Key, shape: tuple[int, ...]) -> tuple[int, ...]:
    """One device holds everything."""
    return shape


class Writer:
    """Writes parts to FOLDER/weights. Removes what a killed writer left half done; the caller holds the lock.

    No chunk of an array reaches over the border of a `piece`.
    """

    def __init__(self, folder: str | Path, piece: Piece = whole):
        self._piece = piece
        self.folder = Path(folder).absolute() / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        for rest in self.folder.glob(f"*{UNFINISHED}*/"):
            shutil.rmtree(rest)

    def has(self, part: str) -> bool:
        """Whether `part` is stored, whole."""
        return (self.folder / part).is_dir()

    def save(self, part: str, group: Mapping[Key, np.ndarray]) -> None:
        """Store `group` as `part`; when this returns, it is on disk. A part of that name is replaced.

        Needs memory for bands.BYTES (or one larger chunk) beside the arrays. Raises StorageError when it fails,
        CapacityError when the disk is full.
        """
        context = ocp.Context()
        saving = context.array.saving
        saving.use_compression = False
        saving.scoped_storage_options_creator = self._options
        context.memory.deepcopy_host_arrays = False
        target = self.folder / part
        try:
            if target.exists():
                shutil.rmtree(target)
            with quiet(), chunk_shapes_as_given(), written_in_bands(), context:
                ocp.save(str(target), _nested(group))
            _sync(target)
        except (OSError, ValueError) as error:
            raise writing_failed(target, error) from error

    def _options(self, key: Any, value: Any) -> ocp.options.ArrayOptions.Saving.StorageOptions:
        """The chunk shape of one array, where Orbax expects the axes to be cut."""
        *path, component = (str(entry.key) for entry in key)
        piece = self._piece((".".join(path), component), value.shape)
        shape = chunks.shape_of(piece, value.dtype.itemsize)
        return ocp.options.ArrayOptions.Saving.StorageOptions(shard_axes=shape)

    def finish(self) -> None:
        """Make the names of all parts survive a power cut."""
        sync_folder(self.folder)
        sync_folder(self.folder.parent)


class Reader:
    """Reads arrays from FOLDER/weights, each straight into its target sharding.

    What is there is asked of TensorStore: of a part it tells in 1 ms, Orbax in 25. Raises CheckpointError where a part
    cannot be read.
    """

    def __init__(self, folder: str | Path):
        arrays = Arrays(folder)
        self.folder, self.stored = arrays.folder, arrays.stored
        if arrays.problems:
            found = listing(f"{part} ({why})" for part, why in sorted(arrays.problems.items()))
            raise CheckpointError(f"{self.folder} is damaged or cannot be read: {found}")

    def read(self, items: Mapping[Key, jax.ShapeDtypeStruct | None]) -> dict[Key, jax.Array]:
        """The arrays of `items`, and nothing else, in the shardings given (None, or none given: one device).

        Raises CheckpointError when arrays are missing or are not of the dtype and shape that `items` expects.
        """
        self._check(items)
        found: dict[Key, jax.Array] = {}
        for part in sorted({self.stored[key].part for key in items}):
            targets = {key: self._target(key, items[key]) for key in items if self.stored[key].part == part}
            found |= _load(self.folder / part, targets)
        return {key: found[key] for key in items}

    def _check(self, items: Mapping[Key, jax.ShapeDtypeStruct | None]) -> None:
        if absent := [_name(key) for key in items if key not in self.stored]:
            raise CheckpointError(f"{self.folder} lacks {len(absent)} arrays: {listing(absent)}; nothing was read")
        differing = [
            f"{_name(key)} is stored as {_text(self.stored[key])}, {_text(expected)} is expected"
            for key, expected in items.items()
            if expected is not None and _text(expected) != _text(self.stored[key])
        ]
        if differing:
            raise CheckpointError(
                f"{len(differing)} arrays of {self.folder} are not what is expected; nothing was read: "
                + listing(differing)
            )

    def _target(self, key: Key, expected: jax.ShapeDtypeStruct | None) -> jax.ShapeDtypeStruct:
        stored = self.stored[key]
        sharding = None if expected is None else expected.sharding
        if sharding is None:
            sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.ShapeDtypeStruct(stored.shape, dtype_of(stored.dtype), sharding=sharding)


def _load(folder: Path, targets: Mapping[Key, jax.ShapeDtypeStruct]) -> dict[Key, jax.Array]:
    """The arrays `targets` of one part."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    hide_leftovers()
    try:
        with quiet(), context:
            return _flat(ocp.load(str(folder), _nested(targets)))
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        why = _first_cause(error)
    collect_leftovers()
    raise CheckpointError(f"{folder} is damaged or cannot be read: {why}")


def _first_cause(error: BaseException) -> str:
    """What TensorStore said: Orbax raises exceptions of any type from it, with everything it knows of the array."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [repr(error)])[0][:500]


def _nested(group: Mapping[Key, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for (path, component), array in group.items():
        node = tree
        for piece in path.split("."):
            node = node.setdefault(piece, {})
        node[component] = array
    return tree


def _flat(tree: Any, pieces: tuple[str, ...] = ()) -> dict[Key, Any]:
    if not isinstance(tree, Mapping):
        return {(".".join(pieces[:-1]), pieces[-1]): tree}
    return {key: leaf for piece, node in tree.items() for key, leaf in _flat(node, (*pieces, piece)).items()}


def _sync(folder: Path) -> None:
    """Flush every file below `folder` and every name on the way."""
    for root, _, files in os.walk(folder):
        for file in files:
            with open(os.path.join(root, file), "rb") as stream:
                os.fsync(stream.fileno())
        sync_folder(Path(root))
    sync_folder(folder.parent)


def _name(key: Key) -> str:
    return f"{key[0]}.{key[1]}"


def _text(array: Any) -> str:
    return f"{dtype_of(array.dtype).name} {list(array.shape)}"
