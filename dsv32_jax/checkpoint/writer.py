"""Write the arrays of a converted checkpoint, as files that need no library to read. Imports neither JAX nor Orbax.

FOLDER/weights/PART is an Orbax checkpoint: uncompressed zarr 3 arrays, not packed into OCDBT, so that a file is the
bytes of an array. `orbax.checkpoint.v1.load(PART)` and the older PyTreeCheckpointer read it.

    weights/00003/_METADATA                                     the tree {"layers": {"3": {"ffn": {...}}}}
    weights/00003/layers.3.ffn.w_down_EDM.codes/zarr.json       dtype and shape
    weights/00003/layers.3.ffn.w_down_EDM.codes/c.0.0.0         the bytes in C order

An array that a mesh splits along another axis than the first has a file for each slice (c.0.0.1, ...). Slices along the
first axis are contiguous in one file, so a device reads its own bytes there as well.
"""

import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OutputExistsError, StorageError, writing_failed
from ..system.files import sync
from .folder import WEIGHTS
from .manifest import ArrayEntry, LeafEntry, Place
from .reader import Key, Reader, list_slabs, raw

WRITE_BYTES = 1 << 20
"""Bytes of a write call. Calls of 8 MB, which ask for larger pages of the page cache, took eight times as long on a
virtual machine with Linux 6.18."""

UNFINISHED = ".unfinished"
"""Suffix of the folder of a part that is being written."""

METADATA, DESCRIPTION = "_METADATA", "zarr.json"

Piece = Callable[[Key, tuple[int, ...]], tuple[int, ...]]
"""Returns the shape of one device's slice of an array, given the key and the shape of the array."""


def list_files(folder: str | Path, companions: Iterable[str], leaves: Mapping[str, LeafEntry]) -> dict[str, list]:
    """Return size and SHA-256 of all files but those of arrays: `companions`, and those that describe the arrays."""
    reader = Reader(folder, leaves)
    descriptions = {f"{entry.place.files[0].rpartition('/')[0]}/{DESCRIPTION}" for entry in reader.entries.values()}
    descriptions |= {f"{WEIGHTS}/{entry.part}/{METADATA}" for entry in reader.entries.values()}
    return {name: reader.measure_file(name) for name in (*companions, *sorted(descriptions))}


class Writer:
    """Writes parts into FOLDER/weights, each atomically. The caller holds the lock of the folder."""

    def __init__(self, folder: str | Path, piece: Piece = lambda key, shape: shape):
        self._root, self._piece = Path(folder), piece
        self.folder = self._root / WEIGHTS
        if not os.path.lexists(self.folder):
            self.folder.mkdir()
            sync(self._root)
        if not stat.S_ISDIR(os.lstat(self.folder).st_mode):
            raise OutputExistsError(f"{self.folder} is a link or a file; nothing was touched. Convert to a new folder")

    def save(self, part: str, arrays: Mapping[Key, np.ndarray]) -> dict[Key, Place]:
        """Write `arrays` as the new `part`, and return their places once they are on disk and were read back.

        Needs memory for two slabs beside the arrays. Raises StorageError, or CapacityError when the disk is full.
        """
        building, target = self.folder / (part + UNFINISHED), self.folder / part
        try:
            os.mkdir(building)
            places = {key: self._write(building, part, key, array) for key, array in arrays.items()}
            _write_file(building / METADATA, [json.dumps(_describe_tree(arrays)).encode()])
            sync(building)
            if os.path.lexists(target):
                raise FileExistsError(f"{target} exists")
            os.rename(building, target)
            sync(self.folder)
        except OSError as error:
            raise writing_failed(target, error) from error
        self._check_written(arrays, places)
        return places

    def _write(self, building: Path, part: str, key: Key, array: np.ndarray) -> Place:
        name, piece = ".".join(key), self._piece(key, array.shape)
        axis = next((i for i in range(1, array.ndim) if piece[i] != array.shape[i]), 0)
        count = array.shape[axis] // piece[axis] if axis else 1
        os.mkdir(building / name)
        slices = [array] if count == 1 else np.split(array, count, axis)
        chunks = [".".join(["c", *(str(number * (i == axis)) for i in range(array.ndim))]) for number in range(count)]
        for chunk, one in zip(chunks, slices, strict=True):
            _write_file(building / name / chunk, (raw(one[rows]) for rows in list_slabs(len(one), one.nbytes)))
        _write_file(building / name / DESCRIPTION, [json.dumps(_describe_array(array, slices[0].shape)).encode()])
        sync(building / name)
        return Place(tuple(f"{WEIGHTS}/{part}/{name}/{chunk}" for chunk in chunks), axis)

    def _check_written(self, arrays: Mapping[Key, np.ndarray], places: Mapping[Key, Place]) -> None:
        """Raise StorageError unless the reader that `load` uses finds `arrays` in the files."""
        leaves: dict[str, LeafEntry] = {}
        for (path, component), array in arrays.items():
            entry = ArrayEntry(array.dtype.name, array.shape, "", places[path, component])
            leaves.setdefault(path, LeafEntry("", {})).arrays[component] = entry
        reader = Reader(self._root, leaves)
        for key, array in arrays.items():
            for slab, rows in zip(reader.slabs(key), list_slabs(len(array), array.nbytes), strict=True):
                if not np.array_equal(raw(slab), raw(array[rows])):
                    raise StorageError(f"{reader.where(key)} was written but reads back as something else")


def _write_file(file: Path, chunks: Iterable[memoryview | bytes]) -> None:
    """Write `chunks` to the new `file` and flush it. An existing file or link is an error."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        for chunk in chunks:
            view = memoryview(chunk)
            while view:
                view = view[os.write(descriptor, view[:WRITE_BYTES]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _describe_array(array: np.ndarray, piece: tuple[int, ...]) -> dict[str, Any]:
    """Return zarr's description of an array whose chunks have the shape `piece`."""
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


def _describe_tree(arrays: Mapping[Key, np.ndarray]) -> dict[str, Any]:
    """Return Orbax's description of the nested dict whose leaves are `arrays`."""
    value = {"value_type": "np.ndarray", "skip_deserialize": False}
    tree = {}
    for path, component in arrays:
        keys = (*path.split("."), component)
        tree[str(keys)] = {"key_metadata": [{"key": key, "key_type": 2} for key in keys], "value_metadata": value}
    return {"tree_metadata": tree, "use_ocdbt": False, "use_zarr3": True, "custom_metadata": None}
