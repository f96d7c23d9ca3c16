"""Writing safetensors: shards of limited size whose tensors arrive one by one, and the index that lists them all."""

import json
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from dsv32_jax.checkpoint.manifest import sync_folder
from dsv32_jax.checkpoint.reader import raw

from ..read.safetensors import DTYPES
from ..read.source import INDEX
from .targets import Written

SHARD_BYTES = 5_000_000_000
ALIGNMENT = 8


class Shard(NamedTuple):
    """One file: its name and its tensors."""

    file: str
    tensors: tuple[Written, ...]


def nbytes(tensor: Written) -> int:
    """Bytes of one tensor."""
    return int(np.prod(tensor.shape, dtype=np.int64)) * DTYPES[tensor.dtype].itemsize


def deal(weights: Iterable[Sequence[Written]], limit: int = SHARD_BYTES) -> list[Shard]:
    """The tensors of all weights in shards of at most `limit` bytes; those of one weight stay together."""
    shards: list[list[Written]] = [[]]
    size = 0
    for tensors in weights:
        more = sum(map(nbytes, tensors))
        if shards[-1] and size + more > limit:
            shards.append([])
            size = 0
        shards[-1] += tensors
        size += more
    count = len(shards)
    return [Shard(f"model-{i:05d}-of-{count:05d}.safetensors", tuple(shard)) for i, shard in enumerate(shards, 1)]


def write_index(folder: Path, shards: Iterable[Shard]) -> None:
    """model.safetensors.index.json: every tensor's shard, scales too, and the bytes of all."""
    places = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    total = sum(nbytes(tensor) for shard in shards for tensor in shard.tensors)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def write_json(file: Path, content: object) -> None:
    """`content` as JSON in `file`, on disk when this returns."""
    with open(file, "w", encoding="utf-8") as out:
        json.dump(content, out, indent=2)
        out.write("\n")
        out.flush()
        os.fsync(out.fileno())
    sync_folder(file.parent)


class ShardsWriter:
    """Writes tensors by name, each to its shard. A shard is open from its first tensor to its last."""

    def __init__(self, folder: Path, shards: Iterable[Shard]):
        self._folder = folder
        self._shard = {tensor.name: shard for shard in shards for tensor in shard.tensors}
        self._open: dict[str, _File] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in self._open.values():
            file.close()

    def add(self, name: str, array: np.ndarray) -> None:
        """Write one tensor. With the last one of a shard, the shard is on disk."""
        shard = self._shard[name]
        if shard.file not in self._open:
            self._open[shard.file] = _File(self._folder, shard)
        if self._open[shard.file].add(name, array):
            self._open.pop(shard.file).close()


class _File:
    """One shard, whose tensors come in any order, each to where the header says.

    Wider dtypes lie first, so that every tensor begins at a multiple of its own element: readers map them in place.
    """

    def __init__(self, folder: Path, shard: Shard):
        ordered = sorted(shard.tensors, key=lambda tensor: -DTYPES[tensor.dtype].itemsize)
        self._waiting = {tensor.name: tensor for tensor in ordered}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._offsets: dict[str, int] = {}
        end = 0
        for tensor in ordered:
            self._offsets[tensor.name] = end
            end += nbytes(tensor)
            offsets = [self._offsets[tensor.name], end]
            header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        self._begin = 8 + len(text)
        self._descriptor = os.open(folder / shard.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.ftruncate(self._descriptor, self._begin + end)
        self._write(struct.pack("<Q", len(text)) + text, 0)

    def add(self, name: str, array: np.ndarray) -> bool:
        """Write one tensor; whether it was the last."""
        tensor = self._waiting.pop(name)
        found = (array.dtype, array.shape)
        assert found == (DTYPES[tensor.dtype], tensor.shape), f"{tensor} was planned, {found} is to be written"
        self._write(raw(array), self._begin + self._offsets[name])
        return not self._waiting

    def close(self) -> None:
        """Flush and close."""
        try:
            os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._descriptor, view, offset)
            view, offset = view[done:], offset + done
