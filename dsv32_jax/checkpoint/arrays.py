"""The arrays of a converted checkpoint as NumPy arrays, piece by piece, without JAX.

`store` writes parts with Orbax and reads them into shardings. What lies on disk is zarr 3 in TensorStore's OCDBT, so
TensorStore alone reads it; that starts in 0.2 s where JAX and Orbax take seconds. A part that cannot be read does not
hide the others: `problems` says what is wrong with it.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ..errors import CheckpointError, StorageError

FOLDER = "weights"
UNFINISHED = ".orbax-checkpoint-tmp"
"""What Orbax puts into the name of a checkpoint that it has not finished."""

STATE, DESCRIPTION = "state", "/zarr.json"
SLAB_BYTES = 8 << 20
"""Bytes read together. Measured on NVFP4 codes: 5.4 GB/s in slabs of 8 MB, whose memory is used again, 2.1 of 64 MB."""

Key = tuple[str, str]
"""(leaf path, component name)."""


class ArrayInfo(NamedTuple):
    """One stored array: the part that holds it, NumPy dtype name, shape, and the shape of its chunks."""

    part: str
    dtype: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]


class Arrays:
    """The arrays in FOLDER/weights. `problems`: by part, why it cannot be read.

    Raises CheckpointError where there is no such folder.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).absolute() / FOLDER
        self.stored: dict[Key, ArrayInfo] = {}
        self.problems: dict[str, str] = {}
        self._open: dict[Key, Any] = {}
        for part in parts(self.folder):
            try:
                self.stored |= {key: info for key, info in _contents(self.folder, part)}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                self.problems[part] = _first_line(error)

    def read(self, key: Key, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start..stop-1 of the first axis. Raises StorageError where they cannot be read."""
        info = self.stored[key]
        try:
            return self.open(key)[start : info.shape[0] if stop is None else stop].read().result()
        except (OSError, ValueError) as error:
            code, *_, why = _first_line(error).split(": ")
            raise StorageError(f"{self.where(key)} cannot be read: {code}, {why}") from error

    def where(self, key: Key) -> str:
        """Return an array's name and folder, for messages."""
        return f"{'.'.join(key)} ({FOLDER}/{self.stored[key].part})"

    def open(self, key: Key) -> Any:
        """The TensorStore of one array."""
        if key not in self._open:
            self._open[key] = _open(self.folder / self.stored[key].part, key)
        return self._open[key]

    def slabs(self, key: Key) -> Iterator[tuple[int, np.ndarray]]:
        """The array in pieces of its first axis, whole chunks each and about SLAB_BYTES: first row, rows."""
        step = self.slab_rows(key)
        for start in range(0, self.stored[key].shape[0], step):
            yield start, self.read(key, start, min(start + step, self.stored[key].shape[0]))

    def slab_rows(self, key: Key) -> int:
        """How many rows of the first axis a slab has."""
        info = self.stored[key]
        row = math.prod(info.shape[1:]) * dtype_of(info.dtype).itemsize
        return info.chunk[0] * max(1, SLAB_BYTES // max(1, row * info.chunk[0]))


def raw(array: np.ndarray) -> memoryview:
    """The bytes of `array` in C order; a copy only where they do not lie so."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def dtype_of(dtype: Any) -> np.dtype:
    """The NumPy dtype of a name, which NumPy alone knows of few, or of what already is one."""
    return np.dtype(getattr(ml_dtypes, dtype, dtype) if isinstance(dtype, str) else dtype)


def parts(folder: Path) -> list[str]:
    """The names of the parts in `folder`, in order. Raises CheckpointError where it cannot be listed."""
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and UNFINISHED not in entry.name)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error


def _contents(folder: Path, part: str) -> Iterator[tuple[Key, ArrayInfo]]:
    """Every array of one part, from the descriptions that zarr keeps beside the data."""
    import tensorstore

    store = tensorstore.KvStore.open(_kvstore(folder / part)).result()
    names = [name for name in store.list().result() if name.endswith(DESCRIPTION.encode())]
    values = [store.read(name) for name in names]
    for name, value in zip(names, values, strict=True):
        path, _, component = name.decode().removesuffix(DESCRIPTION).rpartition(".")
        raw = json.loads(value.result().value)
        yield (path, component), ArrayInfo(part, raw["data_type"], tuple(raw["shape"]), _chunk(raw))


def _chunk(raw: dict[str, Any]) -> tuple[int, ...]:
    """What is read as one: the inner chunk where chunks are packed into shards."""
    sharded = next((codec for codec in raw["codecs"] if codec["name"] == "sharding_indexed"), None)
    grid = raw["chunk_grid"] if sharded is None else sharded
    return tuple(grid["configuration"]["chunk_shape"])


def _open(part: Path, key: Key):
    import tensorstore

    kvstore = {**_kvstore(part), "path": f"{key[0]}.{key[1]}/"}
    return tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True, open=True).result()


def _kvstore(part: Path) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{part / STATE}/"}}


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
