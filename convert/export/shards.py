"""Writing safetensors: shards of limited size whose tensors arrive in any order, and the index that lists them all."""

import json
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from dsv32_jax.checkpoint.reader import raw
from dsv32_jax.system.files import sync, write_file

from ..read.safetensors import DTYPES, Tensor
from ..read.source import INDEX

SHARD_BYTES = 5_000_000_000
ALIGNMENT = 8


Shards = dict[str, list[Tensor]]
"""The tensors of each file, by its name."""


def plan_shards(weights: Iterable[Sequence[Tensor]], limit: int = SHARD_BYTES) -> Shards:
    """The tensors of all weights in shards of at most `limit` bytes; those of one weight stay together."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensors in weights:
        more = sum(tensor.nbytes for tensor in tensors)
        if shards[-1] and size + more > limit:
            shards.append([])
            size = 0
        shards[-1] += tensors
        size += more
    count = len(shards)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_json(file: Path, content: object) -> None:
    """Write `content` as JSON, whole or not at all."""
    write_file(file, json.dumps(content, indent=2).encode() + b"\n")


class ShardsWriter:
    """Makes the files of `shards` in a folder and writes their tensors, in any order."""

    def __init__(self, folder: Path, shards: Shards):
        self._folder, self._shards = folder, shards
        self._places: dict[str, Tensor] = {}
        for name, tensors in shards.items():
            self._create(folder / name, tensors)

    def _create(self, file: Path, tensors: Iterable[Tensor]) -> None:
        """Write the header and set the size. Tensors of wider dtypes come first, so that all are aligned."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        ordered, offsets = sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype].itemsize), [0]
        for tensor in ordered:
            offsets.append(offsets[-1] + tensor.nbytes)
            header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets[-2:]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        begin = 8 + len(text)
        for tensor, offset in zip(ordered, offsets, strict=False):
            self._places[tensor.name] = tensor._replace(file=file, offset=begin + offset)
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644), "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(begin + offsets[-1])

    def add(self, name: str, array: np.ndarray) -> None:
        """Write one tensor to its place."""
        tensor = self._places.pop(name)
        found = (array.dtype, array.shape)
        assert found == (DTYPES[tensor.dtype], tensor.shape), f"{tensor} was planned, {found} is to be written"
        with open(os.open(tensor.file, os.O_WRONLY | os.O_NOFOLLOW), "wb") as out:
            out.seek(tensor.offset)
            out.write(raw(array))

    def finish(self) -> None:
        """Flush the files, which then hold all tensors, to the disk, and write the index: the file of each tensor."""
        assert not self._places, f"{len(self._places)} tensors were not written"
        for name in self._shards:
            sync(self._folder / name)
        files = {tensor.name: name for name, tensors in self._shards.items() for tensor in tensors}
        total = sum(tensor.nbytes for tensors in self._shards.values() for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        write_json(self._folder / INDEX, index)
