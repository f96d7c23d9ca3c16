"""Check the files of a converted checkpoint against its manifest. Needs no JAX.

Every byte is covered: the file of an array is the bytes of the array, whose SHA-256 the manifest has; every other file
is listed there with its size and SHA-256; the manifest begins with its own, and is read only if it is right.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..errors import DsvError, StorageError, VerificationError, kind_of, listing
from ..system import host
from ..system.files import hash_chunks
from ..system.reporter import show_slow
from .folder import WEIGHTS, is_stray
from .manifest import Manifest
from .reader import Key, Reader, raw


def find_changed_files(folder: str | Path, manifest: Manifest) -> list[DsvError]:
    """Return what is wrong with the files in `manifest`. Only the sizes of array files are checked."""
    reader = Reader(folder, manifest.leaves)
    problems = reader.find_problems()
    for name, (size, sha256) in manifest.storage["files"].items():
        try:
            if reader.measure_file(name, size) != [size, sha256]:
                problems.append(VerificationError(f"{name} has changed"))
        except (VerificationError, StorageError) as error:
            problems.append(error)
    return sorted(problems, key=str)


def find_damaged_files(folder: str | Path, manifest: Manifest) -> list[DsvError]:
    """Return the same, and the files among the weights that `manifest` does not list."""
    reader, known = Reader(folder, manifest.leaves), set(manifest.storage["files"])
    known |= {name for entry in reader.entries.values() for name in entry.place.files}
    found = {Path(root, name) for root, _, names in os.walk(reader.folder / WEIGHTS) for name in names}
    names = {file.relative_to(reader.folder).as_posix() for file in found}
    surplus = [name for name in names - known if not is_stray(name)]
    foreign = [VerificationError(f"{name} does not belong to the checkpoint") for name in surplus]
    return sorted([*find_changed_files(folder, manifest), *foreign], key=str)


def find_damage(reader: Reader, key: Key, count: Callable[[int], None] = lambda nbytes: None) -> DsvError | None:
    """Return what is wrong with the array `key`, None if it matches its SHA-256. Bytes are counted as they are read."""

    def read() -> Iterator[memoryview]:
        for slab in reader.slabs(key):
            count(slab.nbytes)
            yield raw(slab)

    try:
        if hash_chunks(read()) == reader.entries[key].sha256:
            return None
        return VerificationError(f"{reader.where(key)} has changed")
    except (VerificationError, StorageError) as error:
        return error


def find_damaged_arrays(reader: Reader) -> list[DsvError]:
    """Return the arrays that do not match their SHA-256. A thread per core reads and hashes."""
    sizes = {key: entry.nbytes for key, entry in reader.entries.items()}
    with ThreadPoolExecutor(host.count_cores()) as pool, show_slow(sum(sizes.values())) as count:
        keys = sorted(sizes, key=lambda key: -sizes[key])
        problems = pool.map(find_damage, itertools.repeat(reader), keys, itertools.repeat(count))
        return sorted(filter(None, problems), key=str)


def require_intact(folder: str | Path, manifest: Manifest, level: str) -> None:
    """Raise VerificationError that lists all damage, or StorageError; "quick" checks all but the content of arrays."""
    problems = find_damaged_files(folder, manifest)
    if level == "full" and not problems:
        problems = find_damaged_arrays(Reader(folder, manifest.leaves))
    if problems:
        raise kind_of(problems, VerificationError)(
            f"{folder} is not as written; nothing was loaded: {listing(problems, len(problems))}. "
            "Copy the folder again, or convert again"
        )
