"""Matrices that were converted while their part takes long, each in a file: a stopped conversion goes on from them.

OUTPUT/matrices/NAME holds a line of JSON, which describes the components, and then their bytes. A file is removed when
the part with its matrix is on disk.
"""

import collections
import contextlib
import hashlib
import os
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dsv32_jax.checkpoint.reader import dtype_of, raw
from dsv32_jax.errors import OutputExistsError, listing, pluralize
from dsv32_jax.quantization.quantize import Scaling
from dsv32_jax.system.files import hash_chunks, remove_abandoned, replace_file

from ..read.provenance import HashingReader
from ..read.weights import Read, StoredWeight
from ..transform.requantize import ErrorStats, Requantizer
from .journal import seal, unseal

FOLDER = "matrices"

PATIENCE = 20.0
"""Seconds without a part on disk after which matrices are saved: quick parts need no second copy."""


class SavingRequantizer(Requantizer):
    """A Requantizer that saves matrices in `folder` when no part was saved for PATIENCE seconds, and takes those that a
    stopped run saved. Of the files of `matrices` only those that are `wanted` stay. Raises OutputExistsError if there
    is anything else."""

    def __init__(
        self,
        folder: Path,
        matrices: Collection[str],
        wanted: Collection[str],
        scaling: Scaling,
        pairs: Iterable[tuple[StoredWeight, StoredWeight]],
    ):
        super().__init__(scaling, pairs)
        if folder.is_symlink():
            raise OutputExistsError(f"{folder} is a link; nothing was touched. Convert to a new folder")
        self._folder, self._since = folder, time.monotonic()
        self._changes: collections.deque[tuple[int, int]] = collections.deque()
        self._restored = 0
        if folder.is_dir():
            remove_abandoned(folder)
            entries = list(os.scandir(folder))
            other = [one.name for one in entries if one.name not in matrices or not one.is_file(follow_symlinks=False)]
            if other:
                raise OutputExistsError(
                    f"{folder} holds {pluralize(len(other), 'entry', 'entries')} that no conversion saved: "
                    f"{listing(sorted(other))}; nothing was touched. Move them, and run the same command again"
                )
            self.remove(entry.name for entry in entries if entry.name not in wanted)

    @property
    def nbytes(self) -> int:
        """The bytes of all saved matrices."""
        return sum(entry.stat().st_size for entry in os.scandir(self._folder)) if self._folder.is_dir() else 0

    def load(self, stored: StoredWeight, read: Read) -> dict[str, np.ndarray]:
        """Return what Requantizer does, from the file of the matrix if there is one and its source has not changed."""
        if stored.wanted is None or stored.is_in(stored.wanted):
            return super().load(stored, read)
        assert isinstance(read, HashingReader)
        if (restored := self._restore(stored, read)) is not None:
            return restored
        components = super().load(stored, read)
        if time.monotonic() - self._since > PATIENCE:
            self._save(stored, components, read)
        return components

    def count(self, nbytes: int) -> tuple[int, int]:
        """Return how many of `nbytes` that are in memory were not restored, and the bytes of matrices that were saved
        since the last call."""
        saved = 0
        while self._changes:
            more, restored = self._changes.popleft()
            saved, self._restored = saved + more, self._restored + restored
        known = min(self._restored, nbytes)
        self._restored -= known
        return nbytes - known, saved

    def remove(self, names: Iterable[str]) -> int:
        """Remove the files of matrices that are in a part on disk; return their bytes."""
        self._since, removed = time.monotonic(), 0
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                removed += (self._folder / name).stat().st_size
                (self._folder / name).unlink()
        return removed

    def close(self) -> None:
        """Remove the folder, which is empty once all parts are on disk."""
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def _save(self, stored: StoredWeight, components: dict[str, np.ndarray], read: HashingReader) -> None:
        """Write a matrix to its file; a disk that is full only costs time if the conversion is stopped."""
        name, sources = stored.name, _list_digests(stored, read)
        content = [raw(array) for array in components.values()]
        shapes = [(key, array.dtype.name, array.shape) for key, array in components.items()]
        facts = {"sources": sources, "components": shapes, "errors": self.errors[name], "sha256": hash_chunks(content)}
        with contextlib.suppress(OSError):
            self._folder.mkdir(exist_ok=True)
            with replace_file(self._folder / name) as new, open(new, "wb") as file:
                file.write(seal(facts).encode())
                for piece in content:
                    file.write(piece)
            self._changes.append(((self._folder / name).stat().st_size, 0))

    def _restore(self, stored: StoredWeight, read: HashingReader) -> dict[str, np.ndarray] | None:
        """Return the components of a matrix from its file; None where there is none, or it is damaged or outdated."""
        try:
            with open(os.open(self._folder / stored.name, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                facts: dict[str, Any] = unseal(file.readline().decode().removesuffix("\n"))
                content = file.read()
                nbytes = file.tell()
            if facts["sha256"] != hashlib.sha256(content).hexdigest() or facts["sources"] != _list_digests(
                stored, read
            ):
                return None
            components, at = {}, 0
            for key, dtype, shape in facts["components"]:
                flat = np.frombuffer(content, dtype_of(dtype), int(np.prod(shape)), at)
                components[key], at = flat.reshape(shape), at + flat.nbytes
            self.errors[stored.name] = ErrorStats(*facts["errors"])
        except (OSError, ValueError, LookupError, TypeError):
            return None
        self._changes.append((0, nbytes))
        return components


def _list_digests(stored: StoredWeight, read: HashingReader) -> list[str]:
    """Return the SHA-256 of the tensors of a weight, which are read if they were not."""
    return [source.sha256 for source in read.list_sources([stored])]
