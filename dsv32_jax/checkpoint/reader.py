"""The arrays of a converted checkpoint as NumPy arrays: maps of their files, or copies. Needs neither JAX nor Orbax.

The manifest says which files hold an array; its bytes are all that is in them. Every file is opened here, and only as
what the manifest says it is: a regular file of that size, inside the folder, reached through no link.
"""

import ctypes
import errno
import math
import mmap
import os
import stat
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import CheckpointError, StorageError, listing
from .manifest import ITEM_BYTES, ArrayEntry, LeafEntry, is_inside

SLAB_BYTES = 8 << 20
"""Bytes read together. Measured on NVFP4 codes: 5.4 GB/s in slabs of 8 MB, whose memory is used again, 2.1 of 64 MB."""

ALIGNMENT = 64
"""JAX takes memory on a CPU as it is where it begins at a multiple of this, and copies it elsewhere."""

HUGE_PAGE = 2 << 20

Key = tuple[str, str]
"""Path of a weight, name of a component."""

Index = tuple[slice, ...]
"""A part of an array: a slice with start and stop for each axis."""


class Reader:
    """Reads the arrays of `leaves` in the checkpoint `folder`. Threads may share it.

    Of the folder's own entries one may be a link, so that weights can lie on another disk; nothing below may.
    """

    def __init__(self, folder: str | Path, leaves: Mapping[str, LeafEntry]):
        self.folder = Path(folder)
        self.entries: dict[Key, ArrayEntry] = {
            (path, name): entry for path, leaf in leaves.items() for name, entry in leaf.arrays.items()
        }
        self._folders: set[str] = set()

    def open_file(self, name: str, nbytes: int | None = None) -> int:
        """Return a descriptor of the file `name`, a path below the folder. Raises CheckpointError where it is not a
        file of `nbytes` bytes in there, StorageError where it cannot be read."""
        if not is_inside(name):
            raise CheckpointError(f"{name!r} is outside of the checkpoint")
        try:
            self._require_folders(name.split("/")[:-1])
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_NOFOLLOW if "/" in name else 0)
            descriptor = os.open(self.folder / name, flags)
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointError(f"{name} is missing") from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise CheckpointError(f"{name} is a link") from None
            raise StorageError(f"{name} cannot be read: {error.strerror}") from error
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and nbytes in (None, status.st_size):
            return descriptor
        os.close(descriptor)
        found = f"has {status.st_size} bytes instead of {nbytes}" if stat.S_ISREG(status.st_mode) else "is not a file"
        raise CheckpointError(f"{name} {found}")

    def _require_folders(self, parents: list[str]) -> None:
        """Raise CheckpointError where one of the folders on the way to a file, but the first, is a link."""
        for depth in range(2, len(parents) + 1):
            if (path := "/".join(parents[:depth])) not in self._folders:
                if stat.S_ISLNK(os.lstat(self.folder / path).st_mode):
                    raise CheckpointError(f"{path} is a link")
                self._folders.add(path)

    def problems(self, keys: Iterable[Key] | None = None) -> list[str]:
        """Return what is wrong with the files of `keys`, by default of all arrays; reads no data."""
        found = []
        for key in self.entries if keys is None else keys:
            for name, nbytes in self._files(key):
                try:
                    os.close(self.open_file(name, nbytes))
                except (CheckpointError, StorageError) as error:
                    found.append(str(error))
        return found

    def require_files(self) -> None:
        """Raise CheckpointError that lists every file of an array which is missing or has another size."""
        if problems := self.problems():
            raise CheckpointError(
                f"{len(problems)} file{'s' * (len(problems) > 1)} of {self.folder} "
                f"{'are' if len(problems) > 1 else 'is'} not as written; nothing was loaded: {listing(problems)}. "
                "Copy the folder again, or convert again"
            )

    def where(self, key: Key) -> str:
        """Return the name of an array and the part that holds it, for messages."""
        return f"{'.'.join(key)} (weights/{self.entries[key].part})"

    def map(self, key: Key, index: Index | None = None) -> np.ndarray:
        """Return an array, or the part `index` of it, as a read-only map of its file; as a copy where it spans several.

        A file that is cut short while it is mapped ends the process with SIGBUS when its bytes are used.
        """
        entry = self.entries[key]
        index = tuple(slice(0, size) for size in entry.shape) if index is None else index
        axis, width = entry.place.axis, entry.piece[entry.place.axis]
        number = index[axis].start // width
        if index[axis].stop > (number + 1) * width:
            copied = allocate([part.stop - part.start for part in index], entry.dtype)
            self.copy(key, copied, index)
            return copied
        within = slice(index[axis].start - number * width, index[axis].stop - number * width)
        return self._map(key, number)[(*index[:axis], within, *index[axis + 1 :])]

    def read(self, key: Key, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return rows start..stop-1 of the first axis, in fresh memory. Raises CheckpointError or StorageError."""
        entry = self.entries[key]
        stop = entry.shape[0] if stop is None else stop
        found = np.empty((stop - start, *entry.shape[1:]), dtype_of(entry.dtype))
        self.copy(key, found, (slice(start, stop), *(slice(0, size) for size in entry.shape[1:])))
        return found

    def copy(self, key: Key, out: np.ndarray, index: Index) -> None:
        """Copy the part `index` of an array into `out`, which has its shape. Raises as `read` does."""
        entry = self.entries[key]
        axis, width = entry.place.axis, entry.piece[entry.place.axis]
        for number, (name, nbytes) in enumerate(self._files(key)):
            first = number * width
            start, stop = max(index[axis].start - first, 0), min(index[axis].stop - first, width)
            if start >= stop:
                continue
            begin = first + start - index[axis].start
            target = out[(slice(None),) * axis + (slice(begin, begin + stop - start),)]
            source = (*index[:axis], slice(start, stop), *index[axis + 1 :])
            if target.flags.c_contiguous and source[1:] == tuple(slice(0, size) for size in entry.piece[1:]):
                self._read_into(name, nbytes, target, source[0].start * math.prod(entry.piece[1:]) * target.itemsize)
            else:
                np.copyto(target, self._map(key, number)[source])

    def slabs(self, key: Key) -> Iterator[np.ndarray]:
        """Yield an array in runs of its first axis of about SLAB_BYTES."""
        rows, count = self.slab_rows(key), self.entries[key].shape[0]
        for start in range(0, count, rows):
            yield self.read(key, start, min(start + rows, count))

    def slab_rows(self, key: Key) -> int:
        """Return how many rows of the first axis a slab has."""
        entry = self.entries[key]
        return max(1, SLAB_BYTES * entry.shape[0] // max(1, entry.nbytes))

    def _files(self, key: Key) -> Iterator[tuple[str, int]]:
        entry = self.entries[key]
        return ((name, entry.nbytes // len(entry.place.files)) for name in entry.place.files)

    def _read_into(self, name: str, nbytes: int, target: np.ndarray, offset: int) -> None:
        descriptor, view = self.open_file(name, nbytes), raw(target)
        try:
            while view:
                count = os.preadv(descriptor, [view], offset)
                if not count:
                    raise OSError("it ended while it was read")
                view, offset = view[count:], offset + count
        except OSError as error:
            raise StorageError(f"{name} cannot be read: {error.strerror or error}") from error
        finally:
            os.close(descriptor)

    def _map(self, key: Key, number: int) -> np.ndarray:
        """Return a map of one of the files of an array."""
        entry = self.entries[key]
        name, nbytes = entry.place.files[number], entry.nbytes // len(entry.place.files)
        descriptor = self.open_file(name, nbytes)
        try:
            return map_file(descriptor, nbytes).view(dtype_of(entry.dtype)).reshape(entry.piece)
        except OSError as error:
            raise StorageError(f"{name} cannot be mapped: {error.strerror}") from error
        finally:
            os.close(descriptor)


def raw(array: np.ndarray) -> memoryview:
    """Return the bytes of `array` in C order; a copy only where they do not lie so."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def dtype_of(dtype: Any) -> np.dtype:
    """Return the NumPy dtype of a name, also of one that NumPy alone does not know, or of what already is one."""
    return np.dtype(getattr(ml_dtypes, dtype, dtype) if isinstance(dtype, str) else dtype)


def allocate(shape: Sequence[int], dtype: str) -> np.ndarray:
    """Return uninitialized memory for an array, at a multiple of ALIGNMENT; in huge pages where it is large and the
    system has them, which take a third of the time to fill."""
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if nbytes < HUGE_PAGE:
        memory = np.empty(nbytes + ALIGNMENT, np.uint8)
        memory = memory[-memory.ctypes.data % ALIGNMENT :][:nbytes]
    else:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        memory = np.frombuffer(pages, np.uint8)
    return memory.view(dtype_of(dtype)).reshape(shape)


_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def map_file(descriptor: int, nbytes: int) -> np.ndarray:
    """Return a read-only map of a file, uint8, which does not hold the descriptor as Python's mmap does: thousands of
    files are mapped. It lasts as long as anything refers to it."""
    address = _LIBC.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    buffer = (ctypes.c_uint8 * nbytes).from_address(address)
    weakref.finalize(buffer, _LIBC.munmap, address, nbytes).atexit = False
    found = np.frombuffer(memoryview(buffer), np.uint8)
    found.flags.writeable = False
    return found
