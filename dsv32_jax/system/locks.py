"""One process at a time writes into a folder: a lock of the kernel's, which ends with the process."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import OutputExistsError, StorageError

LOCK = ".lock"
"""The file in an output folder that its writer has locked."""


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the kernel's lock on `folder`, created if needed; the lock ends with the process.

    Raises OutputExistsError if another process has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {error}; nothing was written") from error
    try:
        if os.fstat(descriptor).st_nlink > 1:
            another = "is a hard link, and what it is linked to would change; nothing was touched. Remove it"
            raise OutputExistsError(f"{folder / LOCK} {another}")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _is_being_written(folder, _read_owner(descriptor)) from None
        except OSError as error:
            raise StorageError(
                f"cannot lock {folder}: {error}. Its file system may not support locks; nothing was written. "
                "Write to a local disk and copy the result"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def require_unlocked(folder: Path) -> None:
    """Raise OutputExistsError if another process holds the lock of `folder`. Nothing is created or changed."""
    if writer := find_writer(folder):
        raise _is_being_written(folder, writer)


def find_writer(folder: Path) -> str | None:
    """Return what `lock_folder` noted of the process that holds the lock of `folder`, None if no process does."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_owner(descriptor)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None


def _read_owner(lock: int) -> str:
    return os.pread(lock, 100, 0).decode(errors="replace").strip()


def _is_being_written(folder: Path, writer: str) -> OutputExistsError:
    return OutputExistsError(f"another process ({writer}) is writing {folder}; nothing was touched")
