"""Writing the arrays of a converted checkpoint. Needs neither JAX nor Orbax.

FOLDER/weights/PART is an Orbax checkpoint without OCDBT: a zarr 3 array a component, whose chunks are not compressed,
so that a file is the bytes of an array, and Orbax's description of the tree. `orbax.checkpoint.v1.load(PART)` reads it:

    weights/00003/_METADATA                                      the tree {"layers": {"3": {"ffn": {...}}}}
    weights/00003/layers.3.ffn.w_down_EDM.codes/zarr.json        dtype and shape
    weights/00003/layers.3.ffn.w_down_EDM.codes/c.0.0.0          the bytes

Where a mesh splits an axis other than the first, each piece has a file (c.0.0.1, ...). Pieces along the first axis lie
one after the other in a file, so a device reads its own bytes there anyway.
"""

import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OutputExistsError, StorageError, writing_failed
from .manifest import WEIGHTS, ArrayEntry, LeafEntry, Place, sync_folder
from .reader import SLAB_BYTES, Key, Reader, raw

UNFINISHED = ".unfinished"
"""What the name of a part ends in until it is whole."""

METADATA, DESCRIPTION = "_METADATA", "zarr.json"

Piece = Callable[[Key, tuple[int, ...]], tuple[int, ...]]
"""From the key and the shape of an array to the shape of what one device holds of it."""


def whole(key: Key, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the piece of a single device."""
    return shape


def metadata_files(entries: Mapping[Key, ArrayEntry]) -> list[str]:
    """Return the names of the files that describe the stored arrays `entries` to Orbax, relative to the folder."""
    described = {f"{entry.place.files[0].rpartition('/')[0]}/{DESCRIPTION}" for entry in entries.values()}
    return sorted(described | {f"{WEIGHTS}/{entry.part}/{METADATA}" for entry in entries.values()})


class Writer:
    """Writes parts to FOLDER/weights, each whole or not at all; the caller holds the folder's lock. `piece` says what a
    device holds of an array."""

    def __init__(self, folder: str | Path, piece: Piece = whole):
        self._root, self._piece = Path(folder), piece
        self.folder = self._root / WEIGHTS
        if not os.path.lexists(self.folder):
            self.folder.mkdir()
        if not stat.S_ISDIR(os.lstat(self.folder).st_mode):
            raise OutputExistsError(f"{self.folder} is a link or a file; nothing was touched. Convert to a new folder")

    def save(self, part: str, arrays: Mapping[Key, np.ndarray]) -> dict[Key, Place]:
        """Store `arrays` as the new `part` and return where they lie. They are on disk, and were read back, on return.

        Beside the arrays it takes memory for a slab. Raises StorageError, CapacityError when the disk is full.
        """
        building, target = self.folder / (part + UNFINISHED), self.folder / part
        try:
            os.mkdir(building)
            placed = {key: self._write(building, part, key, array) for key, array in arrays.items()}
            _write_json(building / METADATA, _tree(arrays))
            sync_folder(building)
            if os.path.lexists(target):
                raise FileExistsError(f"{target} exists")
            os.rename(building, target)
            sync_folder(self.folder)
        except OSError as error:
            raise writing_failed(target, error) from error
        self._read_back(arrays, placed)
        return placed

    def finish(self) -> None:
        """Make the names of all parts survive a power cut."""
        sync_folder(self.folder)
        sync_folder(self._root)

    def _write(self, building: Path, part: str, key: Key, array: np.ndarray) -> Place:
        name = ".".join(key)
        folder, piece = building / name, self._piece(key, array.shape)
        axis = next((i for i in range(1, array.ndim) if piece[i] != array.shape[i]), 0)
        width, count = piece[axis], array.shape[axis] // piece[axis] if axis else 1
        shape = tuple(width if i == axis and axis else size for i, size in enumerate(array.shape))
        os.mkdir(folder)
        files = []
        for number in range(count):
            chunk = ".".join(["c", *("0" if i != axis else str(number) for i in range(array.ndim))])
            at = (slice(None),) * axis + (slice(number * width, (number + 1) * width),) if axis else ()
            _write_array(folder / chunk, array[at])
            files.append(f"{WEIGHTS}/{part}/{name}/{chunk}")
        _write_json(folder / DESCRIPTION, _description(array, shape))
        sync_folder(folder)
        return Place(tuple(files), axis)

    def _read_back(self, arrays: Mapping[Key, np.ndarray], placed: Mapping[Key, Place]) -> None:
        """Raise StorageError unless the files, opened as `load` opens them, hold `arrays`."""
        leaves: dict[str, LeafEntry] = {}
        for (path, component), array in arrays.items():
            entry = ArrayEntry(array.dtype.name, array.shape, "", placed[path, component])
            leaves.setdefault(path, LeafEntry("", {})).arrays[component] = entry
        reader = Reader(self._root, leaves)
        for key, array in arrays.items():
            rows = reader.slab_rows(key)
            for i, slab in enumerate(reader.slabs(key)):
                if not np.array_equal(raw(slab), raw(array[i * rows : i * rows + len(slab)])):
                    raise StorageError(f"{reader.where(key)} was written and reads back as something else")


def _create(file: Path) -> int:
    """Return a descriptor of the new `file`, for writing. What is there already, links too, is an error."""
    return os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)


def _write_array(file: Path, array: np.ndarray) -> None:
    """Write the bytes of `array` in C order to the new `file`, on disk on return."""
    rows = max(1, SLAB_BYTES * len(array) // max(1, array.nbytes))
    descriptor = _create(file)
    try:
        for start in range(0, len(array), rows):
            view = raw(array[start : start + rows])
            while view:
                view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(file: Path, content: Any) -> None:
    with open(_create(file), "w", encoding="utf-8") as out:
        json.dump(content, out)
        out.flush()
        os.fsync(out.fileno())


def _description(array: np.ndarray, piece: tuple[int, ...]) -> dict[str, Any]:
    """Return zarr's description of `array`, a chunk a piece."""
    endian = {"configuration": {"endian": "little"}} if array.itemsize > 1 else {}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(array.shape),
        "data_type": array.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(piece)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0,
        "codecs": [{"name": "bytes", **endian}],
    }


def _tree(arrays: Mapping[Key, np.ndarray]) -> dict[str, Any]:
    """Return Orbax's description of the nested dict whose leaves are `arrays`."""
    tree = {}
    for path, component in arrays:
        keys = (*path.split("."), component)
        steps = [{"key": key, "key_type": 2} for key in keys]
        tree[str(keys)] = {
            "key_metadata": steps,
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    return {"tree_metadata": tree, "use_ocdbt": False, "use_zarr3": True, "custom_metadata": None}
