"""Writing safetensors: shards of limited size whose tensors arrive in any order, and the index that lists them all."""

import json
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from dsv32_jax.checkpoint.reader import raw
from dsv32_jax.system.files import write_file

from ..read.safetensors import DTYPES
from ..read.source import INDEX
from .encode import OutputTensor

SHARD_BYTES = 5_000_000_000
ALIGNMENT = 8


class Shard(NamedTuple):
    """One file: its name and its tensors."""

    file: str
    tensors: tuple[OutputTensor, ...]


def plan_shards(weights: Iterable[Sequence[OutputTensor]], limit: int = SHARD_BYTES) -> list[Shard]:
    """The tensors of all weights in shards of at most `limit` bytes; those of one weight stay together."""
    shards: list[list[OutputTensor]] = [[]]
    size = 0
    for tensors in weights:
        more = sum(tensor.nbytes for tensor in tensors)
        if shards[-1] and size + more > limit:
            shards.append([])
            size = 0
        shards[-1] += tensors
        size += more
    count = len(shards)
    return [Shard(f"model-{i:05d}-of-{count:05d}.safetensors", tuple(shard)) for i, shard in enumerate(shards, 1)]


def write_index(folder: Path, shards: Iterable[Shard]) -> None:
    """Write model.safetensors.index.json: the shard of every tensor, and the bytes of all."""
    places = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def write_json(file: Path, content: object) -> None:
    """Write `content` as JSON, whole or not at all."""
    write_file(file, json.dumps(content, indent=2).encode() + b"\n")


class ShardsWriter:
    """Writes tensors by name, each to its shard. A shard is open from its first tensor to its last."""

    def __init__(self, folder: Path, shards: Iterable[Shard]):
        self._folder = folder
        self._shards = {tensor.name: shard for shard in shards for tensor in shard.tensors}
        self._open: dict[str, _ShardFile] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            os.close(file.descriptor)

    def add(self, name: str, array: np.ndarray) -> None:
        """Write one tensor. With its last one, a shard is flushed to disk."""
        shard = self._shards[name]
        file = self._open.get(shard.file)
        if file is None:
            file = self._open[shard.file] = _ShardFile(self._folder, shard)
        file.write(name, array)
        if not file.missing:
            os.fsync(file.descriptor)
            os.close(self._open.pop(shard.file).descriptor)


class _ShardFile:
    """An open shard. Tensors of wider dtypes come first, so that all are aligned and can be mapped."""

    def __init__(self, folder: Path, shard: Shard):
        ordered = sorted(shard.tensors, key=lambda tensor: -DTYPES[tensor.dtype].itemsize)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self.missing: dict[str, tuple[OutputTensor, int]] = {}
        end = 0
        for tensor in ordered:
            self.missing[tensor.name] = tensor, end
            offsets = [end, end := end + tensor.nbytes]
            header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        self._begin = 8 + len(text)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        self.descriptor = os.open(folder / shard.file, flags, 0o644)
        os.ftruncate(self.descriptor, self._begin + end)
        self._write(struct.pack("<Q", len(text)) + text, 0)

    def write(self, name: str, array: np.ndarray) -> None:
        """Write one tensor to its place."""
        tensor, offset = self.missing.pop(name)
        found = (array.dtype, array.shape)
        assert found == (DTYPES[tensor.dtype], tensor.shape), f"{tensor} was planned, {found} is to be written"
        self._write(raw(array), self._begin + offset)

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self.descriptor, view, offset)
            view, offset = view[done:], offset + done
