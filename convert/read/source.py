"""A checkpoint in Hugging Face layout: config.json and safetensors shards, whose headers are the truth."""

import contextlib
import fnmatch
import gc
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsv32_jax.checkpoint.manifest import is_complete
from dsv32_jax.errors import CheckpointError, StorageError, listing
from dsv32_jax.system.files import JsonLimits, parse_json

from . import declared_quant, hub, index, reading
from .header import DTYPES, LARGEST_HEADER, Tensor, read_header
from .reading import FileId
from .waiting import waiting

CONFIG = "config.json"
SHARD = "model*.safetensors"
STRAY = ("consolidated*", "*.incomplete", "*.aria2", "._*", "*.tmp")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

LARGEST_COUNT = 2_000_000
"""Tensors of all shards together; the real model has 180,000 in NVFP4."""

PIECE = 64 << 20
"""Bytes of a tensor that are compared together."""


class Source:
    """The tensors of a checkpoint folder, by name over all shards. Opening it reads headers only.

    Raises CheckpointError that lists every problem of every shard, StorageError when the folder cannot be read.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.notes: list[str] = []
        self.files: dict[Path, FileId] = {}
        self.header_sha256: dict[Path, str] = {}
        self.tensors: dict[str, Tensor] = {}
        self.unlisted: list[str] = []
        self._problems: list[str] = []
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder; nothing was read")
        if is_complete(self.folder):
            raise CheckpointError(
                f"{self.folder} is a converted checkpoint already: `dsv32_jax.load` reads it as it is"
            )
        self.config = self._read_config()
        self.quantization = self._read_json(declared_quant.FILE)
        with _no_collection():
            self._weight_map, problems = self._read_index()
            self._problems += problems
            for file in self._shards():
                self._open(file)
            self._compare()
        self.notes += hub.notes(self.files)
        if self._problems:
            raise CheckpointError(
                f"{self.folder} cannot be read; nothing was written. {len(self._problems)} problems:\n  "
                + "\n  ".join(self._problems)
            )

    def require_index(self) -> None:
        """Raise CheckpointError when the index is absent or does not list every tensor of the shards."""
        if self.unlisted:
            raise CheckpointError(
                f"{self.folder}: {len(self.unlisted)} tensors are in the shards but not in {index.NAME}, and "
                f"--strict-index is given; nothing was written: {listing(self.unlisted, 20)}"
            )

    @property
    def identity(self) -> dict[str, dict[str, Any]]:
        """Size and header digest of every shard, by name: what a resumed conversion must find again."""
        return {
            file.name: {"size": identity.size, "header_sha256": self.header_sha256[file]}
            for file, identity in sorted(self.files.items())
        }

    @property
    def stamps(self) -> dict[str, list[int]]:
        """Inode and time of the last change of every shard, by name: where they differ, its bytes may."""
        return {file.name: [found.inode, found.mtime_ns] for file, found in sorted(self.files.items())}

    def read(self, tensor: Tensor) -> np.ndarray:
        """The whole tensor. Raises StorageError when the file changed since its header was read."""
        return self._bytes(tensor, 0, tensor.nbytes).view(DTYPES[tensor.dtype]).reshape(tensor.shape)

    def pieces(self, tensor: Tensor) -> Iterator[np.ndarray]:
        """The bytes of the tensor, PIECE at a time."""
        return (self._bytes(tensor, at, min(PIECE, tensor.nbytes - at)) for at in range(0, tensor.nbytes, PIECE))

    def _bytes(self, tensor: Tensor, start: int, count: int) -> np.ndarray:
        return reading.read(tensor.file, self.files[tensor.file], tensor.offset + start, count, tensor.name)

    def _read_config(self) -> dict[str, Any]:
        config = self._read_json(CONFIG)
        if isinstance(config, dict):
            return config
        self._problems.append(f"{CONFIG} is missing" if config is None else f"{CONFIG} does not hold an object")
        return {}

    def _read_json(self, name: str) -> Any:
        """The content of the JSON file `name`, None when it is absent or (a problem, then) not readable."""
        file = self.folder / name
        try:
            if not file.exists():
                return None
            if not stat.S_ISREG(file.stat().st_mode) or file.stat().st_size > LARGEST_HEADER:
                raise CheckpointError(f"not a regular file of at most {LARGEST_HEADER} bytes")
            return parse_json(file.read_bytes(), JsonLimits())
        except (OSError, CheckpointError) as error:
            self._problems.append(f"{name} cannot be read: {error}")
            return {} if name == CONFIG else None

    def _read_index(self) -> tuple[dict[str, str], list[str]]:
        found = self._read_json(index.NAME)
        return ({}, []) if found is None else index.weight_map(found)

    def _shards(self) -> list[Path]:
        """What the index names and what is called like a shard; without either, every safetensors file."""
        try:
            names = sorted(os.listdir(self.folder))
        except OSError as error:
            raise StorageError(f"{self.folder} cannot be listed: {error}") from error
        candidates = [name for name in names if name.endswith(".safetensors") and not _matches(name, STRAY)]
        listed = set(self._weight_map.values())
        chosen = [name for name in candidates if name in listed or fnmatch.fnmatch(name, SHARD)]
        chosen = chosen or candidates
        ignored = [name for name in names if _matches(name, STRAY)] + sorted(set(candidates) - set(chosen))
        if ignored:
            self.notes.append(f"{len(ignored)} files are no shards and were ignored: {listing(ignored)}")
        if not chosen and not self._weight_map:
            pickles = [name for name in names if _matches(name, (*PICKLES, "*.gguf"))]
            other = f"; {listing(pickles)}: pickles and GGUF are not read" if pickles else ""
            self._problems.append(f"there are no safetensors files{other}")
        return [self.folder / name for name in chosen]

    def _open(self, file: Path) -> None:
        """Take in the tensors of one shard; whatever is wrong with it becomes a problem."""
        try:
            descriptor = reading.open_regular(file)
            try:
                identity = reading.identity(descriptor)
                with waiting(str(file)):
                    header = read_header(descriptor, file, identity.size)
            finally:
                os.close(descriptor)
        except (OSError, CheckpointError) as error:
            self._problems.append(str(error))
            return
        self.files[file] = identity
        self.header_sha256[file] = hashlib.sha256(header.text).hexdigest()
        found = {tensor.name: tensor for tensor in header.tensors}
        self._require_same([(self.tensors[name], found[name]) for name in sorted(found.keys() & self.tensors.keys())])
        self.tensors |= found

    def _require_same(self, twice: list[tuple[Tensor, Tensor]]) -> None:
        """Tensors that are in two shards must be equal; then either of them will do."""
        if not twice:
            return
        others = listing(sorted({first.file.name for first, _ in twice}))
        where = f"both in {twice[0][1].file.name} and in {others}"
        if differing := [first.name for first, second in twice if not self._equal(first, second)]:
            self._problems.append(f"{len(differing)} tensors are {where}, and differ: {listing(differing)}")
        else:
            self.notes.append(f"{len(twice)} tensors are {where}, and equal: {listing((t.name for t, _ in twice), 3)}")

    def _equal(self, first: Tensor, second: Tensor) -> bool:
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        return all(map(np.array_equal, self.pieces(first), self.pieces(second)))

    def _compare(self) -> None:
        """What the index and the headers disagree about."""
        if len(self.tensors) > LARGEST_COUNT:
            self._problems.append(f"{len(self.tensors)} tensors, at most {LARGEST_COUNT} are allowed")
        found = index.compare(self._weight_map, self.tensors, self.folder, self.files)
        self._problems += found.problems
        self.unlisted = found.unlisted
        if self._weight_map and self.unlisted:
            few = listing(self.unlisted, 3)
            self.notes.append(f"{len(self.unlisted)} tensors are in the shards but not in {index.NAME}: {few}")


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Hundreds of thousands of small objects are made and kept: looking for garbage takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
