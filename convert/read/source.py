"""A checkpoint in Hugging Face layout: config.json and safetensors shards, whose headers are the truth.

The index is a hint: NVIDIA's own NVFP4 checkpoints leave the scale tensors out of it. Files are read with pread, never
mapped (a mapped file that shrinks kills the process), and each must be the file it was when its header was read.
"""

import contextlib
import errno
import fnmatch
import gc
import hashlib
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv32_jax.errors import CheckpointError, StorageError, listing
from dsv32_jax.storage.manifest import FILE

from .header import DTYPES, LARGEST_HEADER, Tensor, read_header, strict_json

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
SHARD = "model*.safetensors"
STRAY = ("consolidated*", "*.incomplete", "*.aria2", "._*", "*.tmp")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)
WAITS = (0.5, 3.0)
"""Errors of network disks that often pass, and the seconds to wait before a read is tried again."""


class FileId(NamedTuple):
    """What tells a file from another one of the same name."""

    device: int
    inode: int
    size: int
    mtime_ns: int


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
        if (self.folder / FILE).exists():
            raise CheckpointError(
                f"{self.folder} is a converted checkpoint already: `dsv32_jax.load` reads it as it is"
            )
        self.config = self._read_config()
        with _no_collection():
            weight_map = self._read_index()
            for file in self._shards(weight_map):
                self._open(file)
            self._compare(weight_map)
        if self._problems:
            raise CheckpointError(
                f"{self.folder} cannot be converted; nothing was written. {len(self._problems)} problems:\n  "
                + "\n  ".join(self._problems)
            )

    def require_index(self) -> None:
        """Raise CheckpointError when the index is absent or does not list every tensor of the shards."""
        if self.unlisted:
            raise CheckpointError(
                f"{self.folder}: {len(self.unlisted)} tensors are in the shards but not in {INDEX}, and --strict-index "
                f"is given; nothing was written: {listing(self.unlisted, 20)}"
            )

    @property
    def identity(self) -> dict[str, dict[str, Any]]:
        """Size and header digest of every shard, by name: what a resumed conversion must find again."""
        return {
            file.name: {"size": identity.size, "header_sha256": self.header_sha256[file]}
            for file, identity in sorted(self.files.items())
        }

    def read(self, tensor: Tensor) -> np.ndarray:
        """The whole tensor. Raises StorageError when the file changed since its header was read."""
        raw = self._bytes(tensor, tensor.offset, tensor.nbytes)
        return raw.view(DTYPES[tensor.dtype]).reshape(tensor.shape)

    def read_rows(self, tensor: Tensor, start: int, stop: int) -> np.ndarray:
        """The rows start..stop-1 of the tensor's first axis."""
        row = tensor.nbytes // tensor.shape[0]
        raw = self._bytes(tensor, tensor.offset + start * row, (stop - start) * row)
        return raw.view(DTYPES[tensor.dtype]).reshape(stop - start, *tensor.shape[1:])

    def _bytes(self, tensor: Tensor, offset: int, count: int) -> np.ndarray:
        """The bytes, after some patience where a disk does not give them at once."""
        for wait in (*WAITS, None):
            try:
                raw, done = self._try(tensor.file, offset, count)
            except StorageError:
                raise
            except OSError as error:
                if wait is not None and error.errno in PASSING:
                    time.sleep(wait)
                    continue
                raise StorageError(
                    f"{tensor.file} cannot be read at {offset}, tensor {tensor.name}: {error}. "
                    "What was written before is kept; run the same command again to continue"
                ) from error
            if done < count:
                raise StorageError(f"{tensor.file} ends at {offset + done}, in tensor {tensor.name}")
            return raw
        raise AssertionError("the last attempt returns or raises")

    def _try(self, file: Path, offset: int, count: int) -> tuple[np.ndarray, int]:
        """One attempt: the bytes, and how many of them there were."""
        raw, done = np.empty(count, np.uint8), 0
        descriptor = os.open(file, os.O_RDONLY)
        try:
            self._require_unchanged(descriptor, file)
            while done < count:
                if not (got := os.preadv(descriptor, [raw.data[done:]], offset + done)):
                    break
                done += got
            self._require_unchanged(descriptor, file)
        finally:
            os.close(descriptor)
        return raw, done

    def _require_unchanged(self, descriptor: int, file: Path) -> None:
        if _identity(os.fstat(descriptor)) != self.files[file]:
            raise StorageError(
                f"{file} changed while it was being read (is it still downloading?). "
                "What was written before is kept; convert again when the file is complete"
            )

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
            return strict_json(file.read_bytes())
        except (OSError, CheckpointError) as error:
            self._problems.append(f"{name} cannot be read: {error}")
            return None if name == INDEX else {}

    def _read_index(self) -> dict[str, str]:
        """The index's map from tensor to shard; only plain names of files in this folder survive."""
        index = self._read_json(INDEX)
        if index is None:
            return {}
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict):
            self._problems.append(f"{INDEX} has no weight_map")
            return {}
        names = {name for name in weight_map.values() if isinstance(name, str)}
        good = {name for name in names if name == os.path.basename(name) and name.isprintable() and "\\" not in name}
        good -= {"", ".", ".."}
        if len(good) == len(names) and set(map(type, weight_map.values())) == {str}:
            return weight_map
        if wrong := sorted({ascii(name) for name in weight_map.values() if type(name) is not str or name not in good}):
            self._problems.append(
                f"{INDEX} names {len(wrong)} shards that are not files of this folder: {listing(wrong)}"
            )
        return {tensor: name for tensor, name in weight_map.items() if type(name) is str and name in good}

    def _shards(self, weight_map: dict[str, str]) -> list[Path]:
        """What the index names and what is called like a shard; without either, every safetensors file."""
        try:
            names = sorted(os.listdir(self.folder))
        except OSError as error:
            raise StorageError(f"{self.folder} cannot be listed: {error}") from error
        candidates = [name for name in names if name.endswith(".safetensors") and not _matches(name, STRAY)]
        listed = set(weight_map.values())
        chosen = [name for name in candidates if name in listed or fnmatch.fnmatch(name, SHARD)]
        chosen = chosen or candidates
        ignored = [name for name in names if _matches(name, STRAY)] + sorted(set(candidates) - set(chosen))
        if ignored:
            self.notes.append(f"{len(ignored)} files are no shards and were ignored: {listing(ignored)}")
        if not chosen and not weight_map:
            pickles = [name for name in names if _matches(name, (*PICKLES, "*.gguf"))]
            other = f"; {listing(pickles)}: pickles and GGUF are not read" if pickles else ""
            self._problems.append(f"there are no safetensors files{other}")
        return [self.folder / name for name in chosen]

    def _open(self, file: Path) -> None:
        """Take in the tensors of one shard; whatever is wrong with it becomes a problem."""
        try:
            if not stat.S_ISREG(os.stat(file).st_mode):
                raise CheckpointError(f"{file} is not a regular file")
            descriptor = os.open(file, os.O_RDONLY)
            try:
                identity = _identity(os.fstat(descriptor))
                header = read_header(descriptor, file, identity.size)
            finally:
                os.close(descriptor)
        except (OSError, CheckpointError) as error:
            self._problems.append(str(error))
            return
        self.files[file] = identity
        self.header_sha256[file] = hashlib.sha256(header.text).hexdigest()
        found = {tensor.name: tensor for tensor in header.tensors}
        if twice := sorted(found.keys() & self.tensors.keys()):
            others = sorted({self.tensors[name].file.name for name in twice})
            where = f"both in {file.name} and in {listing(others)}"
            self._problems.append(f"{len(twice)} tensors are {where}: {listing(twice)}")
        self.tensors |= found

    def _compare(self, weight_map: dict[str, str]) -> None:
        """What the index and the headers disagree about."""
        absent = [name for name in sorted(set(weight_map.values())) if not (self.folder / name).exists()]
        for shard in absent:
            lacking = [name for name, file in weight_map.items() if file == shard]
            self._problems.append(
                f"shard {shard} is missing; the index says it holds {len(lacking)} tensors: {listing(lacking, 4)}"
            )
        if weight_map.keys() == self.tensors.keys():
            return
        unread = {name for name in set(weight_map.values()) if self.folder / name not in self.files}
        gone = [name for name, file in weight_map.items() if name not in self.tensors and file not in unread]
        if gone:
            self._problems.append(f"{len(gone)} tensors of the index are in no shard: {listing(gone)}")
        self.unlisted = [name for name in self.tensors if name not in weight_map]
        if weight_map and self.unlisted:
            few = listing(self.unlisted, 3)
            self.notes.append(f"{len(self.unlisted)} tensors are in the shards but not in {INDEX}: {few}")


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


def _identity(status: os.stat_result) -> FileId:
    return FileId(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
