"""What `hf download` knows of the files it fetched: the revision each belongs to, and the SHA-256 of its bytes.

In the cache a file is a link from snapshots/REVISION/ to a blob whose name is its SHA-256; a folder of its own has
.cache/huggingface/download/FILE.metadata beside the file, with the revision in the first line, the SHA-256 in the next.
"""

import hashlib
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from dsv32_jax.errors import CheckpointError, UsageError, listing
from dsv32_jax.system.progress import Progress

from . import reading
from .reading import FileId

METADATA = ".cache/huggingface/download"
LONGEST = 1000
PIECE = 16 << 20


class Known(NamedTuple):
    """A commit of the hub, and a SHA-256; empty where it is not known."""

    revision: str
    sha256: str


def known(file: Path) -> Known:
    """What is known of `file`."""
    if file.is_symlink():
        blob = file.readlink().name
        snapshot = file.parent.name if file.parent.parent.name == "snapshots" else ""
        return Known(snapshot, blob if _is_sha256(blob) else "")
    metadata = file.parent / METADATA / f"{file.name}.metadata"
    if not metadata.is_file():
        return Known("", "")
    with open(metadata, encoding="utf-8", errors="replace") as lines:
        revision, sha256 = (*lines.read(LONGEST).split("\n"), "", "")[:2]
    return Known(revision if re.fullmatch("[0-9a-f]{40}", revision) else "", sha256 if _is_sha256(sha256) else "")


def notes(shards: Iterable[Path]) -> list[str]:
    """A note where the shards do not all belong to one revision."""
    revisions: dict[str, list[str]] = {}
    for file in shards:
        revisions.setdefault(known(file).revision, []).append(file.name)
    if len(revisions) < 2:
        return []
    texts = (f"{revision[:12] or 'unknown'} ({listing(names, 2)})" for revision, names in revisions.items())
    return [f"the shards belong to {len(revisions)} revisions of the repository: {listing(texts)}"]


def require_intact(shards: Mapping[Path, FileId], workers: int, progress: Callable[[Progress], None]) -> None:
    """Raise CheckpointError that lists every shard whose bytes do not have the SHA-256 that the hub says.

    Raises UsageError before anything is read where that is not known of all of them.
    """
    expected = {file: known(file).sha256 for file in shards}
    if unknown := [file.name for file, sha256 in expected.items() if not sha256]:
        raise UsageError(
            f"--verify-source: the SHA-256 of {len(unknown)} shards is not known here ({listing(unknown, 4)}); "
            "`hf download` leaves it beside what it downloads. Nothing was read"
        )
    total, lock, done = sum(found.size for found in shards.values()), threading.Lock(), 0
    progress(Progress(done, total, ""))

    def is_damaged(file: Path) -> bool:
        nonlocal done
        found, size = hashlib.sha256(), shards[file].size
        for at in range(0, size, PIECE):
            piece = reading.read(file, shards[file], at, min(PIECE, size - at), "any")
            found.update(piece.data)
            with lock:
                done += piece.nbytes
                progress(Progress(done, total, file.name))
        return found.hexdigest() != expected[file]

    with ThreadPoolExecutor(workers) as pool:
        verdicts = zip(shards, pool.map(is_damaged, shards), strict=True)
        damaged = [file.name for file, verdict in verdicts if verdict]
    if damaged:
        raise CheckpointError(
            f"{len(damaged)} shards do not have the SHA-256 that the hub says: {listing(damaged, 20)}. "
            "Nothing new was written; download them again"
        )


def _is_sha256(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", text) is not None
