"""The bytes of one file, which must stay the file it was.

They are read with pread, never mapped: a mapped file that shrinks kills the process.
"""

import errno
import os
import stat
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsv32_jax.errors import CheckpointError, StorageError

from .waiting import waiting

PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)
WAITS = (0.5, 3.0)
"""Errors of network disks that often pass, and the seconds to wait before a read is tried again."""

PIECE = 64 << 20
"""Bytes asked for at once."""


class FileId(NamedTuple):
    """What tells a file from another one of the same name."""

    device: int
    inode: int
    size: int
    mtime_ns: int


def identity(descriptor: int) -> FileId:
    """Which file is open."""
    status = os.fstat(descriptor)
    return FileId(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def open_regular(file: Path) -> int:
    """A descriptor of `file`. Raises CheckpointError where it is no regular file: to open a pipe could take forever."""
    with waiting(str(file)):
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise CheckpointError(f"{file} is not a regular file")
        return os.open(file, os.O_RDONLY)


def read(file: Path, known: FileId, offset: int, count: int, tensor: str) -> np.ndarray:
    """`count` bytes from `offset`, after some patience where a disk does not give them at once.

    Raises StorageError, which names `tensor`, where the file is not `known` any more or cannot be read.
    """
    for wait in (*WAITS, None):
        try:
            raw, done = _try(file, known, offset, count)
        except StorageError:
            raise
        except OSError as error:
            if wait is not None and error.errno in PASSING:
                time.sleep(wait)
                continue
            raise StorageError(
                f"{file} cannot be read at {offset}, tensor {tensor}: {error}. "
                "What was written before is kept; run the same command again to continue"
            ) from error
        if done < count:
            raise StorageError(f"{file} ends at {offset + done}, in tensor {tensor}")
        return raw
    raise AssertionError("the last attempt returns or raises")


def _try(file: Path, known: FileId, offset: int, count: int) -> tuple[np.ndarray, int]:
    """One attempt: the bytes, and how many of them there were."""
    raw, done = np.empty(count, np.uint8), 0
    with waiting(str(file)):
        descriptor = os.open(file, os.O_RDONLY)
    try:
        _require_unchanged(descriptor, file, known)
        while done < count:
            with waiting(str(file)):
                got = os.preadv(descriptor, [raw.data[done : done + PIECE]], offset + done)
            if not got:
                break
            done += got
        _require_unchanged(descriptor, file, known)
    finally:
        os.close(descriptor)
    return raw, done


def _require_unchanged(descriptor: int, file: Path, known: FileId) -> None:
    if identity(descriptor) != known:
        raise StorageError(
            f"{file} changed while it was being read (is it still downloading?). "
            "What was written before is kept; convert again when the file is complete"
        )
