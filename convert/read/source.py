"""A checkpoint folder in Hugging Face layout: config.json, safetensors shards and, as a hint, their index.

The shard headers are the truth. model.safetensors.index.json is often wrong: NVIDIA's own NVFP4 checkpoints leave the
scale tensors out of it.
"""

import fnmatch
import gc
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dsv32_jax.checkpoint.manifest import is_complete
from dsv32_jax.errors import CheckpointError, StorageError, UsageError, argument, listing, pluralize
from dsv32_jax.system.files import JsonLimits, hash_chunks, read_json
from dsv32_jax.system.progress import Progress

from .safetensors import DTYPES, MAX_HEADER_BYTES, FileId, Tensor, read_bytes, read_header

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
QUANTIZATION = "hf_quant_config.json"
SHARD = "model*.safetensors"
STRAY = ("consolidated*", "*.incomplete", "*.aria2", "._*", "*.tmp")
UNSUPPORTED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.gguf")

DOWNLOADS = ".cache/huggingface/download"
"""Where `hf download` keeps, in FILE.metadata, the revision and the SHA-256 of each file: a line each."""

MAX_TENSORS = 2_000_000
"""Tensors of all shards together; the real model has 180,000 in NVFP4."""

CHUNK_BYTES = 16 << 20


class Source:
    """The tensors of a checkpoint folder, by name over all shards. Opening it reads headers only.

    Raises CheckpointError listing every problem of every shard, or StorageError if the folder cannot be listed.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.notes: list[str] = []
        self.files: dict[Path, FileId] = {}
        self.tensors: dict[str, Tensor] = {}
        self.unlisted: list[str] = []
        self._header_sha256: dict[Path, str] = {}
        self._problems: list[str] = []
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder; nothing was read")
        if is_complete(self.folder):
            raise CheckpointError(f"{self.folder} is already converted: `dsv32_jax.load` reads it as it is")
        config = self._read_json(CONFIG, unreadable={})
        if not isinstance(config, dict):
            self._problems.append(f"{CONFIG} is missing" if config is None else f"{CONFIG} is not a JSON object")
        self.config: dict[str, Any] = config if isinstance(config, dict) else {}
        self.quantization = self._read_json(QUANTIZATION)
        self._read_shards(self._read_index())
        self.notes += _compare_revisions(self.files)
        if self._problems:
            raise CheckpointError(
                f"{self.folder} cannot be read; nothing was written. {pluralize(len(self._problems), 'problem')}:\n  "
                + "\n  ".join(self._problems)
            )

    def require_complete_index(self) -> None:
        """Raise CheckpointError if the index is missing or does not list every tensor of the shards."""
        if self.unlisted:
            raise CheckpointError(
                f"{self.folder}: {self._describe_unlisted(20)}. Nothing was written; "
                f"leave out {argument('strict_index')} to go by the shards"
            )

    @property
    def identity(self) -> dict[str, dict[str, Any]]:
        """Size and header digest of every shard, by name: a resumed conversion must find the same."""
        return {
            file.name: {"size": found.size, "header_sha256": self._header_sha256[file]}
            for file, found in sorted(self.files.items())
        }

    @property
    def stamps(self) -> dict[str, list[int]]:
        """Inode and modification time of every shard, by name: if they differ, its bytes may."""
        return {file.name: [found.inode, found.mtime_ns] for file, found in sorted(self.files.items())}

    def read(self, tensor: Tensor) -> np.ndarray:
        """Read a whole tensor. Raises StorageError if the file has changed since its header was read."""
        return self._read_bytes(tensor, 0, tensor.nbytes).view(DTYPES[tensor.dtype]).reshape(tensor.shape)

    def read_chunks(self, tensor: Tensor) -> Iterator[np.ndarray]:
        """Yield the bytes of a tensor, CHUNK_BYTES at a time."""
        for start in range(0, tensor.nbytes, CHUNK_BYTES):
            yield self._read_bytes(tensor, start, min(CHUNK_BYTES, tensor.nbytes - start))

    def _read_bytes(self, tensor: Tensor, start: int, count: int) -> np.ndarray:
        return read_bytes(tensor.file, self.files[tensor.file], tensor.offset + start, count, tensor.name)

    def _read_json(self, name: str, unreadable: Any = None) -> Any:
        """Parse a JSON file of the folder: None if it is absent; a problem and `unreadable` if it cannot be read."""
        try:
            file = self.folder / name
            return read_json(file, MAX_HEADER_BYTES, JsonLimits()) if file.exists() else None
        except (OSError, CheckpointError) as error:
            self._problems.append(f"cannot read {error}")
            return unreadable

    def _read_index(self) -> dict[str, str]:
        """Return the shard of each tensor by the index; only plain file names."""
        if (index := self._read_json(INDEX)) is None:
            return {}
        listed = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(listed, dict):
            self._problems.append(f"{INDEX} has no weight_map")
            return {}
        names = {name for name in listed.values() if isinstance(name, str)}
        valid = {name for name in names if name == os.path.basename(name) and name.isprintable() and "\\" not in name}
        valid -= {"", ".", ".."}
        if wrong := sorted({ascii(name) for name in listed.values() if type(name) is not str or name not in valid}):
            self._problems.append(f"{INDEX} has {pluralize(len(wrong), 'invalid shard name')}: {listing(wrong)}")
        return {tensor: name for tensor, name in listed.items() if type(name) is str and name in valid}

    def _read_shards(self, listed: Mapping[str, str]) -> None:
        """Read every header and compare the tensors with those of the index."""
        collects = gc.isenabled()
        gc.disable()  # of the time, a third would go into looking for garbage among 180,000 new tensors
        try:
            for file in self._find_shards(set(listed.values())):
                self._read_shard(file)
            if len(self.tensors) > MAX_TENSORS:
                self._problems.append(f"{len(self.tensors)} tensors, above the limit of {MAX_TENSORS}")
            self._compare_index(listed)
        finally:
            if collects:
                gc.enable()

    def _find_shards(self, listed: set[str]) -> list[Path]:
        """Return the files that the index lists or that are named like shards; failing that, all safetensors files."""
        try:
            names = sorted(os.listdir(self.folder))
        except OSError as error:
            raise StorageError(f"cannot list {self.folder}: {error}") from error
        candidates = [name for name in names if name.endswith(".safetensors") and not _matches(name, STRAY)]
        shards = [name for name in candidates if name in listed or fnmatch.fnmatch(name, SHARD)] or candidates
        ignored = [name for name in names if _matches(name, STRAY)] + sorted(set(candidates) - set(shards))
        if ignored:
            self.notes.append(f"ignored {pluralize(len(ignored), 'non-shard file')}: {listing(ignored)}")
        if not shards and not listed:
            others = [name for name in names if _matches(name, UNSUPPORTED)]
            others = f"; pickles and GGUF are not supported: {listing(others)}" if others else ""
            self._problems.append(f"there are no safetensors files{others}")
        return [self.folder / name for name in shards]

    def _read_shard(self, file: Path) -> None:
        try:
            header = read_header(file)
        except (OSError, CheckpointError) as error:
            self._problems.append(str(error))
            return
        self.files[file], self._header_sha256[file] = header.file_id, header.sha256
        found = {tensor.name: tensor for tensor in header.tensors}
        self._compare_duplicates(
            [(self.tensors[name], found[name]) for name in sorted(found.keys() & self.tensors.keys())]
        )
        self.tensors |= found

    def _compare_duplicates(self, twice: list[tuple[Tensor, Tensor]]) -> None:
        """Note tensors that two shards store; it is a problem if they differ."""
        if not twice:
            return
        others = listing(sorted({first.file.name for first, _ in twice}))
        where = f"stored in {twice[0][1].file.name} and again in {others}"
        if differing := [first.name for first, second in twice if not self._equal(first, second)]:
            count = pluralize(len(differing), "tensor")
            self._problems.append(f"{count} {where} with different content: {listing(differing)}")
        else:
            count = pluralize(len(twice), "tensor")
            self.notes.append(f"{count} {where} with equal content: {listing((t.name for t, _ in twice), 3)}")

    def _equal(self, first: Tensor, second: Tensor) -> bool:
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        return all(map(np.array_equal, self.read_chunks(first), self.read_chunks(second)))

    def _compare_index(self, listed: Mapping[str, str]) -> None:
        shards = sorted(set(listed.values()))
        for shard in (shard for shard in shards if not (self.folder / shard).exists()):
            lacking = [name for name, file in listed.items() if file == shard]
            count = pluralize(len(lacking), "tensor")
            self._problems.append(f"shard {shard} is missing; the index says it holds {count}: {listing(lacking, 4)}")
        if listed.keys() == self.tensors.keys():
            return
        unread = {shard for shard in shards if self.folder / shard not in self.files}
        if gone := [name for name, file in listed.items() if name not in self.tensors and file not in unread]:
            self._problems.append(
                f"{INDEX} lists {pluralize(len(gone), 'tensor')} that no shard holds: {listing(gone)}"
            )
        self.unlisted = [name for name in self.tensors if name not in listed]
        if listed and self.unlisted:
            self.notes.append(self._describe_unlisted(3))

    def _describe_unlisted(self, most: int) -> str:
        count = pluralize(len(self.unlisted), "tensor")
        return f"{INDEX} does not list {count} of the shards: {listing(self.unlisted, most)}"


def verify_downloads(files: Mapping[Path, FileId], workers: int, report: Callable[[Progress], None]) -> None:
    """Raise CheckpointError listing every shard whose bytes do not have the SHA-256 that `hf download` recorded.

    Raises UsageError, before anything is read, if it is not recorded for all of them.
    """
    expected = {file: _find_download(file)[1] for file in files}
    if unknown := [file.name for file, sha256 in expected.items() if not sha256]:
        raise UsageError(
            f"{argument('verify_source')} needs the SHA-256 that `hf download` records beside the files; it is missing "
            f"for {pluralize(len(unknown), 'shard')}: {listing(unknown, 4)}. Nothing was read"
        )
    done, total, damaged = 0, sum(file_id.size for file_id in files.values()), []
    report(Progress(done, total, ""))

    def hash_file(file: Path) -> str:
        starts = range(0, files[file].size, CHUNK_BYTES)
        sizes = (min(CHUNK_BYTES, files[file].size - start) for start in starts)
        return hash_chunks(read_bytes(file, files[file], *at, "any") for at in zip(starts, sizes, strict=True))

    with ThreadPoolExecutor(workers) as pool:
        for file, sha256 in zip(files, pool.map(hash_file, files), strict=True):
            damaged += [file.name] if sha256 != expected[file] else []
            done += files[file].size
            report(Progress(done, total, file.name))
    if damaged:
        raise CheckpointError(
            f"{pluralize(len(damaged), 'shard')} with another SHA-256 than `hf download` recorded: "
            f"{listing(damaged, 20)}. Nothing was written; download again"
        )


def _find_download(file: Path) -> tuple[str, str]:
    """Return the hub's revision and SHA-256 of a downloaded file, "" where unknown.

    In the hub's cache a file is a link from snapshots/REVISION/ to a blob that is named by its SHA-256.
    """
    if file.is_symlink():
        revision, sha256 = file.parent.name if file.parent.parent.name == "snapshots" else "", file.readlink().name
    elif (metadata := file.parent / DOWNLOADS / f"{file.name}.metadata").is_file():
        with open(metadata, encoding="utf-8", errors="replace") as text:
            revision, sha256, *_ = (*text.read(1000).split("\n"), "", "")
        revision = revision if re.fullmatch("[0-9a-f]{40}", revision) else ""
    else:
        return "", ""
    return revision, sha256 if re.fullmatch("[0-9a-f]{64}", sha256) else ""


def _compare_revisions(files: Iterable[Path]) -> list[str]:
    """Return a note if the shards come from several revisions of a repository."""
    revisions: dict[str, list[str]] = {}
    for file in files:
        revisions.setdefault(_find_download(file)[0], []).append(file.name)
    if len(revisions) < 2:
        return []
    texts = (f"{revision[:12] or 'unknown'} ({listing(names, 2)})" for revision, names in revisions.items())
    return [f"the shards come from {len(revisions)} revisions of the repository: {listing(texts)}"]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
