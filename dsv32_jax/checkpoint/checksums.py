"""Whether the files of a converted checkpoint are those that were written. Needs no JAX.

Every byte is covered: an array's file is the bytes of the array, which has its SHA-256 in the manifest; every other
file is listed there with its size and SHA-256; and the manifest's first line has the SHA-256 of the rest.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..errors import CheckpointError, StorageError, VerificationError, listing
from ..system import host
from .manifest import FILE, WEIGHTS, LeafEntry, Manifest, is_sealed
from .reader import Key, Reader, raw
from .writer import metadata_files

STRAYS = (".DS_Store", "._")
"""The beginnings of the names of files that file managers leave anywhere; they are neither content nor damage."""


def list_files(folder: str | Path, companions: Iterable[str], leaves: Mapping[str, LeafEntry]) -> dict[str, list]:
    """Return size and SHA-256 of the checkpoint's files that hold no array: `companions`, and the weights' metadata."""
    reader = Reader(folder, leaves)
    return {name: _measure(reader, name) for name in (*companions, *metadata_files(reader.entries))}


def changed_files(folder: str | Path, manifest: Manifest) -> list[str]:
    """Return what is wrong with the files that `manifest` lists. Of those that hold arrays only the sizes are read."""
    reader = Reader(folder, manifest.leaves)
    problems = reader.problems()
    for name, (size, sha256) in manifest.storage.get("files", {}).items():
        try:
            if _measure(reader, name, size)[1] != sha256:
                problems.append(f"{name} has changed")
        except (CheckpointError, StorageError) as error:
            problems.append(str(error))
    return sorted(problems)


def damaged_files(folder: str | Path, manifest: Manifest) -> list[str]:
    """Return the same, and the files among the weights that `manifest` does not list."""
    reader, known = Reader(folder, manifest.leaves), set(manifest.storage.get("files", {}))
    known |= {name for entry in reader.entries.values() for name in entry.place.files}
    found = {Path(root, name) for root, _, names in os.walk(reader.folder / WEIGHTS) for name in names}
    found = {file.relative_to(reader.folder).as_posix() for file in found if not file.name.startswith(STRAYS)}
    surplus = [f"{name} does not belong to the checkpoint" for name in found - known]
    return sorted([*changed_files(folder, manifest), *surplus])


def damaged_arrays(reader: Reader, count: Callable[[int], None] = lambda nbytes: None) -> list[str]:
    """Return the arrays whose bytes do not have their SHA-256, read on all cores; `count` hears of bytes."""

    def check(key: Key) -> str | None:
        found = hashlib.sha256()
        try:
            for slab in reader.slabs(key):
                found.update(raw(slab))
                count(slab.nbytes)
        except (CheckpointError, StorageError) as error:
            return str(error)
        return None if found.hexdigest() == reader.entries[key].sha256 else f"{reader.where(key)} has changed"

    largest_first = sorted(reader.entries, key=lambda key: -reader.entries[key].nbytes)
    with ThreadPoolExecutor(host.count_cores()) as pool:
        return sorted(problem for problem in pool.map(check, largest_first) if problem)


def require_written(folder: str | Path, manifest: Manifest) -> None:
    """Raise StorageError where the files that were written for `manifest`, which is not yet there, are not what is read
    of them: that would not be a converted checkpoint."""
    if problems := changed_files(folder, manifest):
        raise StorageError(f"{folder} was written and reads back as something else: {listing(problems)}")


def require_manifest(folder: str | Path) -> None:
    """Raise VerificationError where manifest.json is not, byte for byte, what was written."""
    if not is_sealed((Path(folder) / FILE).read_bytes().decode(errors="replace")):
        raise VerificationError(
            f"{Path(folder) / FILE} has changed since it was written, and everything is measured against it. "
            "Nothing else was looked at; copy the folder again, or convert again"
        )


def require_intact(folder: str | Path, manifest: Manifest, level: str) -> None:
    """Raise VerificationError that lists everything which is not as `manifest`, or its own first line, says.

    `level` "quick" compares all but the bytes of the arrays, "full" these too.
    """
    require_manifest(folder)
    problems = damaged_files(folder, manifest)
    if level == "full" and not problems:
        problems = damaged_arrays(Reader(folder, manifest.leaves))
    if problems:
        raise VerificationError(
            f"{folder} is not as it was written; nothing was loaded: {listing(problems, len(problems))}. "
            "Copy the folder again, or convert again"
        )


def _measure(reader: Reader, name: str, nbytes: int | None = None) -> list:
    """Return the size of a file and its SHA-256."""
    with open(reader.open_file(name, nbytes), "rb") as stream:
        return [os.fstat(stream.fileno()).st_size, hashlib.file_digest(stream, "sha256").hexdigest()]
