"""The folder a conversion writes to: whose it is, and that no one else is writing it."""

import contextlib
import fcntl
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from dsv32_jax.checkpoint.manifest import FILE, JOURNAL
from dsv32_jax.errors import CapacityError, CheckpointError, OutputExistsError, StorageError, UsageError, listing
from dsv32_jax.system.progress import format_size

LOCK = ".lock"
RESERVE = 64 << 20
"""Bytes of disk that a conversion leaves free beyond what it plans to write."""

OPEN_FILES = 192
"""Files that Python, the journal and TensorStore's threads have open at most, beside one for each worker."""

COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
"""Files of the source that the converted checkpoint keeps."""


def require_apart(src: Path, dst: Path) -> None:
    """Raise UsageError when one folder lies in the other."""
    first, second = src.resolve(), dst.resolve()
    if first == second or first in second.parents or second in first.parents:
        raise UsageError(f"{src} and {dst} must be separate folders, neither inside the other; nothing was written")


def require_ours(dst: Path) -> None:
    """Raise OutputExistsError when `dst` exists and holds anything but a conversion."""
    try:
        names = set(os.listdir(dst)) - {LOCK}
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise OutputExistsError(f"{dst} is a file; nothing was touched. Convert to another folder") from None
    if names and not names & {FILE, JOURNAL, Path(JOURNAL).with_suffix(".tmp").name}:
        raise OutputExistsError(
            f"{dst} holds something else ({len(names)} entries: {listing(sorted(names))}); nothing was touched. "
            "Convert to another folder, or empty this one yourself"
        )


def require_space(dst: Path, needed: int) -> None:
    """Raise CapacityError when `needed` bytes do not fit on the disk of `dst`."""
    free, reserve = shutil.disk_usage(dst).free, needed // 50 + RESERVE
    if free < needed + reserve:
        raise CapacityError(
            f"{dst} has {format_size(free)} free, and {format_size(needed)} are still to be written, with "
            f"{format_size(reserve)} to spare. Nothing new was written; free some space or convert to another disk"
        )


def require_files(workers: int) -> None:
    """Make room for the files that are open at the same time. Raises CapacityError where that is not allowed."""
    needed = OPEN_FILES + workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise CapacityError(
            f"{needed} files may be open at the same time, but this process may open only {hard} (ulimit -Hn). "
            "Nothing new was written; raise the limit"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@contextlib.contextmanager
def locked(dst: Path) -> Iterator[None]:
    """Hold the kernel's lock on `dst`, which goes with the process. Raises OutputExistsError when another has it."""
    try:
        dst.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(dst / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise StorageError(f"{dst} cannot be written: {error}; nothing was written") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 100, 0).decode(errors="replace").strip()
            raise OutputExistsError(f"another process ({owner}) is writing {dst}; nothing was touched") from None
        except OSError as error:
            raise StorageError(
                f"{dst} cannot be locked: {error}. Its file system may not support that; nothing was written. "
                "Convert to a local disk and copy the result"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def require_companions(src: Path) -> None:
    """Raise CheckpointError where a file that is to be copied is there and cannot be: a dangling link, a pipe."""
    if wrong := [name for name in COMPANIONS if os.path.lexists(src / name) and not (src / name).is_file()]:
        raise CheckpointError(
            f"{src}: {listing(wrong)} should be files and are not (links that lead nowhere?); nothing was written. "
            "Download them again, or remove them"
        )


def copy_companions(src: Path, dst: Path) -> list[str]:
    """Copy what the tokenizer and the chat need, as it is; the names of what was there."""
    found = [name for name in COMPANIONS if (src / name).is_file()]
    for name in found:
        with open(src / name, "rb") as source, open(dst / name, "wb") as target:
            shutil.copyfileobj(source, target)
            target.flush()
            os.fsync(target.fileno())
    return found
