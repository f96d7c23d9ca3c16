"""Whether the files of a converted checkpoint are those that were written. Nothing here needs JAX.

The manifest lists every file with its size. All but large ones of the store are listed with their SHA-256 too: in those
lie the arrays, each of which has its own.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, VerificationError, listing
from .arrays import Key, raw
from .manifest import FILE, LeafEntry, Manifest
from .manifest_text import is_sealed

SMALL = 1 << 20
"""Bytes of the largest file of the store that is listed with its SHA-256."""

WEIGHTS = "weights/"


def files(folder: str | Path, companions: Iterable[str]) -> dict[str, list]:
    """The checkpoint's files by their paths below `folder`, its `companions` and those of the store's parts: size, and
    SHA-256, or None of a large one of the store. What else lies there is not the checkpoint's."""
    found = {name: Path(folder, name) for name in companions}
    for part in (entry for entry in Path(folder, WEIGHTS).iterdir() if entry.is_dir()):
        found |= {f"{WEIGHTS}{part.name}/{name}": file for name, file in _walk(part)}
    return {
        name: [size := file.stat().st_size, None if size > SMALL and name.startswith(WEIGHTS) else _sha256(file)]
        for name, file in found.items()
    }


def damaged_files(folder: str | Path, manifest: Manifest) -> list[str]:
    """What is wrong with the files of `folder`, measured against `manifest`; reads only small ones."""
    folder, recorded = Path(folder), manifest.storage.get("files", {})
    found = set(recorded) | {WEIGHTS + name for name, _ in _walk(folder / WEIGHTS)}
    return [problem for name in sorted(found) for problem in _differences(name, folder / name, recorded.get(name))]


def require_weights(folder: str | Path, manifest: Manifest) -> None:
    """Raise CheckpointError that lists every file of the store which is missing or has another size; none is read."""
    recorded = {name: [size, None] for name, (size, _) in manifest.storage.get("files", {}).items()}
    problems = [
        problem
        for name, entry in recorded.items()
        if name.startswith(WEIGHTS)
        for problem in _differences(name, Path(folder, name), entry)
    ]
    if problems:
        raise CheckpointError(
            f"{len(problems)} files of {folder} are not as they were written; nothing was loaded: {listing(problems)}. "
            "Copy the folder again, or convert again"
        )


def require_manifest(folder: str | Path) -> None:
    """Raise VerificationError where manifest.json is not, byte for byte, what was written."""
    if not is_sealed((Path(folder) / FILE).read_bytes().decode(errors="replace")):
        raise VerificationError(
            f"{Path(folder) / FILE} has changed since it was written, and everything is measured against it. "
            "Nothing else was looked at; copy the folder again, or convert again"
        )


def require_files(folder: str | Path, manifest: Manifest) -> None:
    """Raise VerificationError that lists every file which is not what `manifest`, or the manifest's own line, says."""
    require_manifest(folder)
    if problems := damaged_files(folder, manifest):
        raise VerificationError(
            f"{len(problems)} files of {folder} are not as they were written; nothing was loaded: "
            f"{listing(problems, len(problems))}. Copy the folder again, or convert again"
        )


def require_arrays(folder: str | Path, entries: Mapping[str, LeafEntry], arrays: Mapping[Key, Any]) -> None:
    """Raise VerificationError that lists every loaded array whose bytes are not those of its leaf's entry."""
    changed = [
        f"{path}.{name}"
        for (path, name), array in arrays.items()
        if hashlib.sha256(raw(array)).hexdigest() != entries[path].arrays[name].sha256
    ]
    if changed:
        raise VerificationError(
            f"{len(changed)} arrays of {folder} have changed since they were written; nothing was loaded: "
            f"{listing(changed, len(changed))}. Copy the folder again, or convert again"
        )


def _differences(name: str, file: Path, entry: Sequence | None) -> list[str]:
    if entry is None:
        return [f"{name} does not belong to the checkpoint"]
    if not file.is_file():
        return [f"{name} is missing"]
    (size, sha256), found = entry, file.stat().st_size
    if found != size:
        return [f"{name} has {found} bytes instead of {size}"]
    if sha256 is not None and _sha256(file) != sha256:
        return [f"{name} has changed"]
    return []


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    for root, _, names in os.walk(folder):
        for name in names:
            file = Path(root, name)
            yield file.relative_to(folder).as_posix(), file


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
