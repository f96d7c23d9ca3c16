"""How fast the disks are, measured in a second: for an estimate, not for a benchmark."""

import os
import tempfile
import time
from pathlib import Path

from ..read.source import Source

PIECE = 8 << 20
MOST_BYTES = 256 << 20
SECONDS = 0.5


def existing(folder: Path) -> Path:
    """The nearest folder above `folder`, or itself, that exists."""
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())


def write_speed(folder: Path) -> float | None:
    """Bytes a second that `folder`'s file system takes, written and flushed; None where nothing can be written there.

    Leaves nothing behind: the file it writes has no name.
    """
    piece, written = os.urandom(PIECE), 0
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            began = time.monotonic()
            while written < MOST_BYTES and time.monotonic() - began < SECONDS:
                written += file.write(piece)
            os.fsync(file.fileno())
            return written / max(time.monotonic() - began, 1e-6)
    except OSError:
        return None


def read_speed(source: Source) -> float:
    """Bytes a second that the source's largest shard gives, read past the page cache where the kernel allows it."""
    file = max(source.files, key=lambda file: source.files[file].size)
    descriptor, read = os.open(file, os.O_RDONLY), 0
    try:
        os.posix_fadvise(descriptor, 0, MOST_BYTES, os.POSIX_FADV_DONTNEED)
        began = time.monotonic()
        while read < MOST_BYTES and time.monotonic() - began < SECONDS:
            if not (got := os.pread(descriptor, PIECE, read)):
                break
            read += len(got)
        return max(read, 1) / max(time.monotonic() - began, 1e-6)
    finally:
        os.close(descriptor)
