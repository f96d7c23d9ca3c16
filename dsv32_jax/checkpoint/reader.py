"""Read the arrays of a converted checkpoint with NumPy: maps of their files, or copies. Imports neither JAX nor Orbax.

The manifest names the files of an array, which hold its bytes and nothing else. All files of a checkpoint are opened
here, and only if they are what the manifest says: regular, of that size, in the folder, and not behind a link.
"""

import ctypes
import errno
import hashlib
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

from ..errors import CheckpointError, DsvError, StorageError, VerificationError, kind_of, listing, pluralize
from .manifest import ITEM_BYTES, ArrayEntry, LeafEntry, is_inside

SLAB_BYTES = 8 << 20
"""Bytes read at a time. Measured on NVFP4 codes: 5.4 GB/s in slabs of 8 MB, whose memory is reused, 2.1 in 64 MB."""

ALIGNMENT = 64
"""On a CPU, JAX uses memory in place that begins at a multiple of this, and copies other memory."""

HUGE_PAGE = 2 << 20

Key = tuple[str, str]
"""Path of a weight and name of a component."""

Index = tuple[slice, ...]
"""A block of an array: a slice of each axis, or of the first ones."""


class Reader:
    """Reads the arrays of `leaves` in the checkpoint `folder`. Threads may share it.

    An entry of the folder itself may be a link, so that the weights can be on another disk; nothing below may.
    """

    def __init__(self, folder: str | Path, leaves: Mapping[str, LeafEntry]):
        self.folder = Path(folder)
        self.entries: dict[Key, ArrayEntry] = {
            (path, name): entry for path, leaf in leaves.items() for name, entry in leaf.arrays.items()
        }
        self._checked: set[str] = set()

    def open_file(self, name: str, nbytes: int | None = None) -> int:
        """Return a descriptor of the file `name`, a path relative to the folder.

        Raises VerificationError unless it is a regular file of `nbytes` bytes in there, StorageError if it is
        unreadable.
        """
        if not is_inside(name):
            raise CheckpointError(f"{name!r} is outside of the checkpoint")
        try:
            self._require_no_links(name.split("/")[:-1])
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_NOFOLLOW if "/" in name else 0)
            descriptor = os.open(os.path.join(self.folder, name), flags)
        except (FileNotFoundError, NotADirectoryError):
            raise VerificationError(f"{name} is missing") from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise VerificationError(f"{name} is a link") from None
            raise StorageError(f"{name} cannot be read: {error.strerror}") from error
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and nbytes in (None, status.st_size):
            return descriptor
        os.close(descriptor)
        found = f"has {status.st_size} bytes instead of {nbytes}" if stat.S_ISREG(status.st_mode) else "is not a file"
        raise VerificationError(f"{name} {found}")

    def measure_file(self, name: str, nbytes: int | None = None) -> list:
        """Return size and SHA-256 of a file, as the manifest has them. Raises as `open_file` does."""
        with open(self.open_file(name, nbytes), "rb") as stream:
            return [os.fstat(stream.fileno()).st_size, hashlib.file_digest(stream, "sha256").hexdigest()]

    def _require_no_links(self, folders: list[str]) -> None:
        """Raise VerificationError if a folder on the way to a file, except the first, is a link."""
        for depth in range(2, len(folders) + 1):
            if (path := "/".join(folders[:depth])) not in self._checked:
                if stat.S_ISLNK(os.lstat(os.path.join(self.folder, path)).st_mode):
                    raise VerificationError(f"{path} is a link")
                self._checked.add(path)

    def find_problems(self, keys: Iterable[Key] | None = None) -> list[DsvError]:
        """Return what is wrong with the files of `keys`, by default of all arrays. Reads no data."""
        found: list[DsvError] = []
        for key in self.entries if keys is None else keys:
            for name, nbytes in self._files(key):
                try:
                    os.close(self.open_file(name, nbytes))
                except (VerificationError, StorageError) as error:
                    found.append(error)
        return found

    def require_files(self, state: str = "nothing was loaded") -> None:
        """Raise VerificationError that lists every array file which is missing or of another size, or StorageError; the
        message says in which `state` things are."""
        if problems := self.find_problems():
            raise kind_of(problems, VerificationError)(
                f"{pluralize(len(problems), 'file')} of {self.folder} {'are' if len(problems) > 1 else 'is'} not as "
                f"written; {state}: {listing(problems)}. Copy the folder again, or convert again"
            )

    def where(self, key: Key) -> str:
        """Return the name and the part of an array, for messages."""
        return f"{'.'.join(key)} (weights/{self.entries[key].part})"

    def map(self, key: Key, index: Index | None = None) -> np.ndarray:
        """Return a block of an array, by default all of it: a read-only map, or a copy if it spans several files.

        If a file is cut short while it is mapped, using its bytes ends the process with SIGBUS.
        """
        entry = self.entries[key]
        index = bound(index, entry.shape)
        axis, width = entry.place.axis, entry.piece[entry.place.axis]
        number = index[axis].start // width
        if index[axis].stop > (number + 1) * width:
            copied = allocate([part.stop - part.start for part in index], entry.dtype)
            self.copy(key, copied, index)
            return copied
        within = slice(index[axis].start - number * width, index[axis].stop - number * width)
        return self._map(key, number)[(*index[:axis], within, *index[axis + 1 :])]

    def read(self, key: Key, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return rows start..stop-1 of the first axis as a copy. Raises VerificationError or StorageError."""
        entry = self.entries[key]
        stop = entry.shape[0] if stop is None else stop
        found = np.empty((stop - start, *entry.shape[1:]), dtype_of(entry.dtype))
        self.copy(key, found, (slice(start, stop),))
        return found

    def copy(self, key: Key, out: np.ndarray, index: Index) -> None:
        """Copy a block of an array into `out`, which has its shape. Raises VerificationError or StorageError."""
        entry = self.entries[key]
        index = bound(index, entry.shape)
        axis, width = entry.place.axis, entry.piece[entry.place.axis]
        whole_rows = tuple(slice(0, size) for size in entry.piece[1:])
        for number, (name, nbytes) in enumerate(self._files(key)):
            first = number * width
            start, stop = max(index[axis].start - first, 0), min(index[axis].stop - first, width)
            if start >= stop:
                continue
            begin = first + start - index[axis].start
            target = out[(slice(None),) * axis + (slice(begin, begin + stop - start),)]
            source = (*index[:axis], slice(start, stop), *index[axis + 1 :])
            if target.flags.c_contiguous and source[1:] == whole_rows:
                self._read_into(target, name, nbytes, source[0].start * nbytes // entry.shape[0])
            else:
                np.copyto(target, self._map(key, number)[source])

    def slabs(self, key: Key) -> Iterator[np.ndarray]:
        """Return an array in runs of rows of about SLAB_BYTES, each read when it is asked for."""
        entry = self.entries[key]
        return (self.read(key, rows.start, rows.stop) for rows in list_slabs(entry.shape[0], entry.nbytes))

    def _files(self, key: Key) -> Iterator[tuple[str, int]]:
        entry = self.entries[key]
        return ((name, entry.nbytes // len(entry.place.files)) for name in entry.place.files)

    def _read_into(self, target: np.ndarray, name: str, nbytes: int, offset: int) -> None:
        descriptor, view = self.open_file(name, nbytes), raw(target)
        try:
            while view:
                count = os.preadv(descriptor, [view], offset)
                if not count:
                    raise OSError("unexpected end of file")
                view, offset = view[count:], offset + count
        except OSError as error:
            raise StorageError(f"{name} cannot be read: {error.strerror or error}") from error
        finally:
            os.close(descriptor)

    def _map(self, key: Key, number: int) -> np.ndarray:
        entry = self.entries[key]
        name, nbytes = list(self._files(key))[number]
        descriptor = self.open_file(name, nbytes)
        try:
            return map_file(descriptor, nbytes).view(dtype_of(entry.dtype)).reshape(entry.piece)
        except OSError as error:
            raise StorageError(f"{name} cannot be mapped: {error.strerror}") from error
        finally:
            os.close(descriptor)


def bound(index: Index | None, shape: Sequence[int]) -> Index:
    """Return `index`, None for all, with the start and stop of every axis of `shape`."""
    sides = zip((*(index or ()), *[slice(None)] * len(shape)), shape, strict=False)
    return tuple(slice(*side.indices(size)[:2]) for side, size in sides)


def list_slabs(count: int, nbytes: int) -> list[slice]:
    """Return the `count` rows of an array in runs of about SLAB_BYTES."""
    rows = max(1, SLAB_BYTES * count // max(1, nbytes))
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


def raw(array: np.ndarray) -> memoryview:
    """Return the bytes of `array` in C order, without a copy if it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def dtype_of(dtype: Any) -> np.dtype:
    """Return the NumPy dtype of `dtype` or of its name, including those of ml_dtypes."""
    return np.dtype(getattr(ml_dtypes, dtype, dtype) if isinstance(dtype, str) else dtype)


def allocate(shape: Sequence[int], dtype: str) -> np.ndarray:
    """Return an uninitialized array aligned to ALIGNMENT, in huge pages if it is large: filling these is faster."""
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
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def map_file(descriptor: int, nbytes: int) -> np.ndarray:
    """Return a read-only map of a file, uint8. It is unmapped when nothing refers to it any more.

    Python's mmap keeps a duplicate of the descriptor open, and a checkpoint has thousands of files. Linux is asked for
    huge pages, which it can refuse. Where the page cache has small pages, a file then comes from the disk 4.5 times as
    fast on first use (2.8 GB/s instead of 0.6), and a decode step takes as long as on copied weights instead of 1.2
    times; where it has large folios (Linux 6.18, ext4) neither changes.
    """
    address = _LIBC.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if nbytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        _LIBC.madvise(address, nbytes, mmap.MADV_HUGEPAGE)
    buffer = (ctypes.c_uint8 * nbytes).from_address(address)
    weakref.finalize(buffer, _LIBC.munmap, address, nbytes).atexit = False
    array = np.frombuffer(memoryview(buffer), np.uint8)
    array.flags.writeable = False
    return array
