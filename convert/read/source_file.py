"""A file of the source: reading it, patiently, and what `hf download` and the hub's cache recorded of it.

Bytes are read with pread, never mapped: a mapped file that shrinks kills the process.
"""

import contextlib
import errno
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsv32_jax.errors import CheckpointError, StorageError, UsageError, argument, listing, pluralize
from dsv32_jax.system.files import hash_chunks, open_regular, read_regular
from dsv32_jax.system.progress import Progress

CALL_BYTES, CHUNK_BYTES = 64 << 20, 16 << 20
"""Bytes per read call, and bytes of a chunk."""

TRANSIENT_ERRORS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)
RETRY_SECONDS = (0.5, 3.0)
STALL_SECONDS = 60.0
"""Network disks: errors that often pass, the pauses before another attempt, and the time after which to warn."""

_reads: dict[int, tuple[Path, float]] = {}
"""The file each thread is reading, and since when."""

DOWNLOADS = ".cache/huggingface/download"
"""Where `hf download` keeps, in FILE.metadata, the revision and the SHA-256 of each file: a line each."""


class FileId(NamedTuple):
    """Identity of a file: it changes when the file is replaced or written to."""

    device: int
    inode: int
    size: int
    mtime_ns: int


def read_bytes(file: Path, file_id: FileId, offset: int, count: int, tensor: str) -> np.ndarray:
    """Read `count` bytes at `offset`, retrying errors that often pass.

    Raises StorageError, naming `tensor`, if the file is no longer `file_id` or cannot be read.
    """
    for pause in (*RETRY_SECONDS, None):
        try:
            return _try_read(file, file_id, offset, count, tensor)
        except StorageError:
            raise
        except OSError as error:
            if pause is None or error.errno not in TRANSIENT_ERRORS:
                raise StorageError(
                    f"cannot read {file} at byte {offset}, tensor {tensor}: {error}. "
                    "What was written so far is kept; run the same command again to continue"
                ) from error
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def read_chunks(file: Path, file_id: FileId, offset: int, count: int, tensor: str) -> Iterator[np.ndarray]:
    """Yield the same bytes, CHUNK_BYTES at a time."""
    for start in range(0, count, CHUNK_BYTES):
        yield read_bytes(file, file_id, offset + start, min(CHUNK_BYTES, count - start), tensor)


def _try_read(file: Path, file_id: FileId, offset: int, count: int, tensor: str) -> np.ndarray:
    raw, done = np.empty(count, np.uint8), 0
    with open_watched(file) as descriptor:
        _require_unchanged(descriptor, file, file_id)
        while done < count:
            _reads[threading.get_ident()] = file, time.monotonic()
            if not (got := os.preadv(descriptor, [raw.data[done : done + CALL_BYTES]], offset + done)):
                raise StorageError(f"{file} ends at byte {offset + done}, within tensor {tensor}")
            done += got
        _require_unchanged(descriptor, file, file_id)
    return raw


def _require_unchanged(descriptor: int, file: Path, file_id: FileId) -> None:
    if identify(descriptor) != file_id:
        raise StorageError(
            f"{file} changed while it was being read (is it still downloading?). "
            "What was written so far is kept; convert again when the file is complete"
        )


def identify(descriptor: int) -> FileId:
    """Return the identity of an open file."""
    status = os.fstat(descriptor)
    return FileId(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@contextlib.contextmanager
def open_watched(file: Path) -> Iterator[int]:
    """Open a regular file for reading, watched by `warn_on_stalled_reads`."""
    thread, descriptor = threading.get_ident(), -1
    _reads[thread] = file, time.monotonic()
    try:
        yield (descriptor := open_regular(file))
    finally:
        del _reads[thread]
        if descriptor >= 0:
            os.close(descriptor)


@contextlib.contextmanager
def warn_on_stalled_reads(warn: Callable[[str], None]) -> Iterator[None]:
    """Inside the `with`, call `warn` for each read that takes longer than STALL_SECONDS: network disks can hang."""
    done = threading.Event()

    def watch() -> None:
        reported: set[tuple[Path, float]] = set()
        while not done.wait(STALL_SECONDS / 20):
            for file, since in set(_reads.copy().values()) - reported:
                if (waited := time.monotonic() - since) >= STALL_SECONDS:
                    reported.add((file, since))
                    warn(f"no data from {file} for {waited:.0f} s: the disk does not respond. Still waiting")

    thread = threading.Thread(target=watch, name="stalled reads", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


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
    report(Progress(done, total))

    def hash_file(file: Path) -> str:
        return hash_chunks(read_chunks(file, files[file], 0, files[file].size, "any"))

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
        revision, sha256, *_ = (*read_regular(metadata, 1000).decode(errors="replace").split("\n"), "", "")
        revision = revision if re.fullmatch("[0-9a-f]{40}", revision) else ""
    else:
        return "", ""
    return revision, sha256 if re.fullmatch("[0-9a-f]{64}", sha256) else ""


def compare_revisions(files: Iterable[Path]) -> list[str]:
    """Return a note if the shards come from several revisions of a repository."""
    revisions: dict[str, list[str]] = {}
    for file in files:
        revisions.setdefault(_find_download(file)[0], []).append(file.name)
    if len(revisions) < 2:
        return []
    texts = (f"{revision[:12] or 'unknown'} ({listing(names, 2)})" for revision, names in revisions.items())
    return [f"the shards come from {len(revisions)} revisions of the repository: {listing(texts)}"]


def require_downloaded(name: str | Path, folder: Path) -> None:
    """Raise CheckpointError with the command that downloads it, if the user's `name` for `folder` is one of the hub."""
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)) and not folder.parent.is_dir():
        raise CheckpointError(
            f"{name} is not a folder here; nothing was read. If it is a name on the Hugging Face hub, download it:\n"
            f"  hf download {name} --local-dir {folder.name}\n"
            f"and convert {folder.name}"
        )
