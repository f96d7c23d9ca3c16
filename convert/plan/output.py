"""The output folder: what may be in it, the lock on it, and the source's files that are copied into it."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dsv32_jax.checkpoint.manifest import FILE, JOURNAL
from dsv32_jax.errors import CheckpointError, OutputExistsError, StorageError, UsageError, listing, pluralize
from dsv32_jax.system.files import is_abandoned, replace_file

LOCK = ".lock"

COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
"""Files of the source that the converted checkpoint keeps."""


def require_apart(src: Path, dst: Path) -> None:
    """Raise UsageError if one folder is within the other."""
    first, second = src.resolve(), dst.resolve()
    if first == second or first in second.parents or second in first.parents:
        raise UsageError(f"{src} and {dst} must be separate folders, neither inside the other; nothing was written")


def require_ours(dst: Path) -> None:
    """Raise OutputExistsError if `dst` exists and holds anything but a conversion, finished or not."""
    try:
        names = set(os.listdir(dst)) - {LOCK}
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise OutputExistsError(f"{dst} is a file; nothing was touched. Write to another folder") from None
    if not names & {FILE, JOURNAL} and not all(is_abandoned(name, JOURNAL) for name in names):
        entries = pluralize(len(names), "entry", "entries")
        raise OutputExistsError(
            f"{dst} holds something else ({entries}: {listing(sorted(names))}); nothing was touched. "
            "Write to another folder, or empty this one yourself"
        )


@contextlib.contextmanager
def lock_folder(dst: Path) -> Iterator[None]:
    """Hold the kernel's lock on `dst`, making the folder if needed; the lock ends with the process.

    Raises OutputExistsError if another process has it.
    """
    try:
        dst.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(dst / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise StorageError(f"cannot write to {dst}: {error}; nothing was written") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 100, 0).decode(errors="replace").strip()
            raise OutputExistsError(f"another process ({owner}) is writing {dst}; nothing was touched") from None
        except OSError as error:
            raise StorageError(
                f"cannot lock {dst}: {error}. Its file system may not support locks; nothing was written. "
                "Write to a local disk and copy the result"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def require_readable_companions(src: Path) -> None:
    """Raise CheckpointError if one of COMPANIONS is there but is no regular file: a dangling link, a pipe."""
    if wrong := [name for name in COMPANIONS if os.path.lexists(src / name) and not (src / name).is_file()]:
        raise CheckpointError(
            f"{src}: not regular files: {listing(wrong)} (dangling links?). Nothing was written; "
            "download them again, or remove them"
        )


def copy_companions(src: Path, dst: Path) -> list[str]:
    """Copy COMPANIONS, which the tokenizer and the chat need; return the names of those that exist."""
    found = [name for name in COMPANIONS if (src / name).is_file()]
    for name in found:
        with replace_file(dst / name) as new, open(src / name, "rb") as source, open(new, "wb") as target:
            shutil.copyfileobj(source, target)
    return found
