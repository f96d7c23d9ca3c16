"""The header of a safetensors file, read strictly: 8 bytes of length, JSON, then the tensors' bytes without gaps.

Stricter than the safetensors library (which allows duplicate keys): whatever is accepted here, it accepts too.
"""

import functools
import math
import operator
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dsv32_jax.errors import CheckpointError, listing
from dsv32_jax.system.files import JsonLimits, parse_json

from .magic import what_it_is

LARGEST_HEADER = 100_000_000
LARGEST_COUNT = 200_000
LARGEST_NAME = 512
LARGEST_RANK = 8
LARGEST_SIZE = 2**62

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}

FIELDS = {"dtype", "shape", "data_offsets"}

BY_NAME = {dtype.name: dtype for dtype in DTYPES.values()}
"""The same by the names that NumPy gives them, which the manifest uses."""


class Tensor(NamedTuple):
    """Where a tensor lies: `nbytes` bytes from `offset` of `file`; `dtype` as safetensors names it."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Header(NamedTuple):
    """The tensors of one file, and the JSON text that lists them."""

    tensors: tuple[Tensor, ...]
    text: bytes


def read_header(descriptor: int, file: Path, size: int) -> Header:
    """The header of the open `file` of `size` bytes. Raises CheckpointError that lists everything wrong with it."""
    start = os.pread(descriptor, 64, 0)
    try:
        text = _header_text(descriptor, start, size)
        limits = JsonLimits(LARGEST_COUNT + 2, 2 * LARGEST_COUNT, 6 * LARGEST_COUNT)
        tensors, problems = _tensors(parse_json(text, limits), file, 8 + len(text), size)
    except CheckpointError as malformed:
        known = what_it_is(start)
        raise CheckpointError(f"{file} is {known}" if known else f"{file}: {malformed}") from None
    if problems:
        raise CheckpointError(f"{file} has a malformed header ({len(problems)} problems): {listing(problems, 20)}")
    return Header(tensors, text)


def _header_text(descriptor: int, start: bytes, size: int) -> bytes:
    if size < 10:
        raise CheckpointError(f"{size} bytes long, too short for a safetensors file" if size else "empty (0 bytes)")
    (length,) = struct.unpack("<Q", start[:8])
    if length > min(LARGEST_HEADER, size - 8):
        limit = "the file's" if length > size - 8 else "the limit of"
        raise CheckpointError(
            f"its header claims {length} bytes, {limit} {min(LARGEST_HEADER, size)} bytes are exceeded"
        )
    text = os.pread(descriptor, length, 8)
    if len(text) != length:
        raise CheckpointError(f"only {len(text)} of the header's {length} bytes could be read")
    if not text.startswith(b"{"):
        raise CheckpointError("its header does not start with {")
    return text


def _tensors(header: Any, file: Path, begin: int, size: int) -> tuple[tuple[Tensor, ...], list[str]]:
    """The tensors that `header` lists, and what is wrong with it. Offsets count from `begin`."""
    metadata = header.pop("__metadata__", {})
    problems = []
    texts = [*metadata, *metadata.values()] if isinstance(metadata, dict) else [metadata]
    if not all(isinstance(text, str) and _is_utf8(text) for text in texts) or isinstance(metadata, str):
        problems.append("__metadata__ is not an object of strings")
    if len(header) > LARGEST_COUNT:
        return (), [f"{len(header)} tensors, at most {LARGEST_COUNT} are allowed in one file"]
    found = []
    for name, entry in header.items():
        if not _is_plain(name, entry) and (wrong := _entry_problem(name, entry)):
            problems.append(f"tensor {ascii(name[:80])}: {wrong}")
            continue
        first, last = entry["data_offsets"]
        found.append(Tensor(name, file, entry["dtype"], tuple(entry["shape"]), begin + first, last - first))
    if not problems:
        problems = _layout_problems(sorted(found, key=operator.attrgetter("offset", "nbytes")), begin, size)
    return tuple(found), problems


def _is_utf8(text: str) -> bool:
    """Whether `text` has no half of a surrogate pair."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _is_plain(name: str, entry: Any) -> bool:
    """Whether one tensor's entry is certainly right: what almost all of 180,000 are, told in a fraction of the time."""
    try:
        (first, last), shape = entry["data_offsets"], entry["shape"]
        right = last - first == _nbytes(entry["dtype"], *shape) and type(first) is type(last) is int and first >= 0
        return right and len(entry) == 3 and type(shape) is list and 0 < len(name) < 128 and name.isprintable()
    except (KeyError, TypeError, ValueError):
        return False


def _entry_problem(name: str, entry: Any) -> str | None:
    """What is wrong with one tensor's entry, taken alone."""
    if not name.isprintable() or not name:
        return "the name has characters that cannot be printed"
    if len(name) > LARGEST_NAME // 4 and len(name.encode()) > LARGEST_NAME:
        return f"the name has {len(name.encode())} bytes, at most {LARGEST_NAME} are allowed"
    if not isinstance(entry, dict) or entry.keys() != FIELDS:
        return "the entry does not have exactly dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"dtype {ascii(dtype)[:40]} is not supported (supported: {', '.join(DTYPES)})"
    try:
        expected = _nbytes(dtype, *shape) if isinstance(shape, list) else _not_sizes(shape)
    except TypeError:
        expected = _not_sizes(shape)
    if isinstance(expected, str):
        return expected
    if not isinstance(offsets, list) or len(offsets) != 2:
        return f"data_offsets {str(offsets)[:80]} are not two ascending positions"
    first, last = offsets
    if type(first) is not int or type(last) is not int or not 0 <= first <= last <= LARGEST_SIZE:
        return f"data_offsets {str(offsets)[:80]} are not two ascending positions"
    if last - first != expected:
        return f"data_offsets {offsets} span {last - first} bytes, {dtype} {shape} needs {expected}"
    return None


@functools.lru_cache(maxsize=4096, typed=True)
def _nbytes(dtype: str, *shape: Any) -> int | str:
    """The bytes of a tensor, or what is wrong with its shape; a checkpoint has few shapes and many tensors."""
    if len(shape) > LARGEST_RANK or not all(type(size) is int and 0 <= size <= LARGEST_SIZE for size in shape):
        return _not_sizes(list(shape))
    if math.prod(max(size, 1) for size in shape) * DTYPES[dtype].itemsize > LARGEST_SIZE:
        return f"shape {list(shape)} is too large"
    return math.prod(shape) * DTYPES[dtype].itemsize


def _not_sizes(shape: Any) -> str:
    return f"shape {str(shape)[:80]} is not a list of at most {LARGEST_RANK} sizes"


def _layout_problems(tensors: list[Tensor], begin: int, size: int) -> list[str]:
    """Overlaps, holes, missing and surplus bytes of `tensors` in the order of their offsets."""
    problems, end = [], begin
    for tensor in tensors:
        if tensor.offset < end:
            problems.append(f"tensor {tensor.name} overlaps the one before it by {end - tensor.offset} bytes")
        elif tensor.offset > end:
            problems.append(f"there is a hole of {tensor.offset - end} bytes before tensor {tensor.name}")
        end = max(end, tensor.offset + tensor.nbytes)
    if size < end:
        problems.append(f"the file is truncated: {end - size} of {end} bytes are missing; download it again")
    elif size > end:
        problems.append(f"{size - end} bytes follow the last tensor")
    return problems
