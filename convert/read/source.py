"""A checkpoint folder in Hugging Face layout: config.json, safetensors shards and, as a hint, their index.

The shard headers are the truth. model.safetensors.index.json is often wrong: NVIDIA's own NVFP4 checkpoints leave the
scale tensors out of it. But where it names a file for every weight of the model, other files in the folder are another
set of weights; and of a tensor that two shards store, the one counts that the index names.
"""

import fnmatch
import gc
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsv32_jax.checkpoint.manifest import is_complete
from dsv32_jax.config import Config
from dsv32_jax.errors import CheckpointError, ConfigError, StorageError, argument, kind_of, listing, pluralize
from dsv32_jax.layout import COPIES, leaves
from dsv32_jax.system.files import JsonLimits, read_json

from .safetensors import DTYPES, MAX_HEADER_BYTES, Tensor, read_header
from .source_file import FileId, compare_revisions, read_bytes, read_chunks

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
QUANTIZATION = "hf_quant_config.json"
SHARD = "model*.safetensors"
STRAY = ("consolidated*", "*.incomplete", "*.aria2", "._*", "*.tmp")
UNSUPPORTED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.gguf")

MAX_TENSORS = 2_000_000
"""Tensors of all shards together; the real model has 180,000 in NVFP4."""


class Source:
    """The tensors of a checkpoint folder, by name over all shards. Opening it reads headers only.

    `ignored_config` and `ignored_tensors` are what the user said to ignore: keys with their values, and patterns.

    Raises CheckpointError listing every problem of every shard, or StorageError if all are failures of reading.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.notes: list[str] = []
        self.files: dict[Path, FileId] = {}
        self.tensors: dict[str, Tensor] = {}
        self.unlisted: list[str] = []
        self.ignored_config: dict[str, Any] = {}
        self.ignored_tensors: list[str] = []
        self._header_sha256: dict[Path, str] = {}
        self._problems: list[object] = []
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
        self.notes += compare_revisions(self.files)
        if self._problems:
            raise kind_of(self._problems, CheckpointError)(
                f"{self.folder} cannot be read; nothing was written. {pluralize(len(self._problems), 'problem')}:\n  "
                + "\n  ".join(map(str, self._problems))
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
        raw = read_bytes(tensor.file, self.files[tensor.file], tensor.offset, tensor.nbytes, tensor.name)
        return raw.view(DTYPES[tensor.dtype]).reshape(tensor.shape)

    def read_chunks(self, tensor: Tensor) -> Iterator[np.ndarray]:
        """Return the bytes of a tensor in chunks."""
        return read_chunks(tensor.file, self.files[tensor.file], tensor.offset, tensor.nbytes, tensor.name)

    def _read_json(self, name: str, unreadable: Any = None) -> Any:
        """Parse a JSON file of the folder: None if it is absent; a problem and `unreadable` if it cannot be read."""
        try:
            file = self.folder / name
            return read_json(file, MAX_HEADER_BYTES, JsonLimits()) if file.exists() else None
        except (OSError, CheckpointError) as error:
            self._problems.append(type(error)(f"cannot read {error}"))
            return unreadable

    def _read_index(self) -> dict[str, str]:
        """Return the shard of each tensor by the index; only plain file names."""
        if (index := self._read_json(INDEX)) is None:
            return {}
        listed = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(listed, dict):
            self._problems.append(f"{INDEX} has no weight_map")
            return {}
        valid = {name for name in listed.values() if isinstance(name, str) and name not in ("", ".", "..")}
        valid = {name for name in valid if name == os.path.basename(name) and name.isprintable() and "\\" not in name}
        valid = {name for name in valid if len(name.encode()) < 256}
        if wrong := sorted({ascii(name) for name in listed.values() if type(name) is not str or name not in valid}):
            self._problems.append(f"{INDEX} has {pluralize(len(wrong), 'invalid shard name')}: {listing(wrong)}")
        return {tensor: name for tensor, name in listed.items() if type(name) is str and name in valid}

    def _read_shards(self, listed: Mapping[str, str]) -> None:
        collects = gc.isenabled()
        gc.disable()  # of the time, a third would go into looking for garbage among 180,000 new tensors
        try:
            for file in self._find_shards(listed):
                self._read_shard(file, listed)
            if len(self.tensors) > MAX_TENSORS:
                self._problems.append(f"{len(self.tensors)} tensors, above the limit of {MAX_TENSORS}")
            self._compare_index(listed)
        finally:
            if collects:
                gc.enable()

    def _find_shards(self, listed: Mapping[str, str]) -> list[Path]:
        """Return the files that the index names, and unless it is complete those that are named like shards; failing
        that, all safetensors files."""
        try:
            names = sorted(os.listdir(self.folder))
        except OSError as error:
            raise StorageError(f"cannot list {self.folder}: {error}") from error
        candidates = [name for name in names if name.endswith(".safetensors") and not _matches(name, STRAY)]
        indexed = set(listed.values())
        complete = self._names_every_weight(listed)
        shards = [name for name in candidates if name in indexed or (not complete and fnmatch.fnmatch(name, SHARD))]
        shards = shards or ([] if indexed else candidates)
        unnamed = [name for name in candidates if name not in shards and fnmatch.fnmatch(name, SHARD)]
        others = [name for name in names if _matches(name, STRAY)] + sorted(set(candidates) - {*shards, *unnamed})
        if others:
            self.notes.append(f"ignored {pluralize(len(others), 'non-shard file')}: {listing(others)}")
        if unnamed:
            count = pluralize(len(unnamed), "file")
            self.notes.append(f"ignored {count} that {INDEX} does not name: {listing(unnamed)}")
        if not shards and not listed:
            others = [name for name in names if _matches(name, UNSUPPORTED)]
            others = f"; pickles and GGUF are not supported: {listing(others)}" if others else ""
            self._problems.append(f"there are no safetensors files{others}")
        return [self.folder / name for name in shards]

    def _names_every_weight(self, listed: Mapping[str, str]) -> bool:
        """Return whether the index names a file for every weight of the model that config.json describes."""
        try:
            table = leaves(Config.from_dict(self.config)) if listed else ()
        except ConfigError:
            return bool(listed)
        names = {name for leaf in table if leaf.path not in COPIES for name in leaf.sources}
        return bool(listed) and all(name in listed or name + "_packed" in listed for name in names)

    def _read_shard(self, file: Path, listed: Mapping[str, str]) -> None:
        try:
            header = read_header(file)
        except (OSError, CheckpointError) as error:
            self._problems.append(str(error) if isinstance(error, FileNotFoundError) else error)
            return
        self.files[file], self._header_sha256[file] = header.file_id, header.sha256
        found = {tensor.name: tensor for tensor in header.tensors}
        twice = [(self.tensors[name], found[name]) for name in sorted(found.keys() & self.tensors.keys())]
        mapped = {first.name for first, _ in twice if listed.get(first.name) in (first.file.name, file.name)}
        self._compare_duplicates([pair for pair in twice if pair[0].name not in mapped])
        if mapped:
            others = listing(sorted({first.file.name for first, _ in twice if first.name in mapped}))
            self.notes.append(
                f"{pluralize(len(mapped), 'tensor')} stored in {file.name} and again in {others}: those that {INDEX} "
                f"names count ({listing((f'{name} in {listed[name]}' for name in sorted(mapped)), 3)})"
            )
        kept = {name for name in mapped if listed[name] != file.name}
        self.tensors |= {name: tensor for name, tensor in found.items() if name not in kept}

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
        if gone := [shard for shard in shards if not (self.folder / shard).exists()]:
            lacking = pluralize(sum(map(set(gone).__contains__, listed.values())), "tensor")
            names = gone if len(gone) <= 4 else [gone[0], "...", gone[-1]]
            self._problems.append(
                f"missing: {len(gone)} of the {pluralize(len(shards), 'shard')} that {INDEX} names, with {lacking}: "
                f"{listing(names)}. `hf download REPOSITORY --local-dir {self.folder}` continues a download; "
                f"if other files hold their tensors, convert a copy of the folder without {INDEX}"
            )
        if listed.keys() == self.tensors.keys():
            return
        unread = {shard for shard in shards if self.folder / shard not in self.files}
        if gone := [name for name, file in listed.items() if name not in self.tensors and file not in unread]:
            texts = (f"{name} (in {listed[name]})" for name in gone)
            self._problems.append(
                f"{INDEX} lists {pluralize(len(gone), 'tensor')} that no shard holds: {listing(texts)}"
            )
        self.unlisted = [name for name in self.tensors if name not in listed]
        if listed and self.unlisted:
            self.notes.append(self._describe_unlisted(3))

    def _describe_unlisted(self, most: int) -> str:
        count = pluralize(len(self.unlisted), "tensor")
        return f"{INDEX} does not list {count} of the shards: {listing(self.unlisted, most)}"


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
