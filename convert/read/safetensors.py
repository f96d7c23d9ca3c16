"""Safetensors files: a header that lists the tensors, then their bytes.

A file is the header's length in 8 bytes, a JSON header, and the tensors without gaps. The header is checked more
strictly than by the safetensors library (which allows duplicate keys), so a file accepted here is accepted there too.
"""

import functools
import hashlib
import math
import operator
import os
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  NumPy learns its dtypes
import numpy as np

from dsv32_jax.errors import CheckpointError, listing, pluralize
from dsv32_jax.system.files import JsonLimits, parse_json, recognize_content

from .source_file import FileId, identify, open_watched

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 200_000
MAX_NAME_BYTES = 512
MAX_RANK = 8
MAX_BYTES = 2**62

NAMES = "BOOL U8 I8 U16 I16 U32 I32 U64 I64 F16 F32 F64 BF16 F8_E4M3 F8_E5M2 F8_E8M0"
NUMPY_NAMES = "bool u1 i1 u2 i2 u4 i4 u8 i8 f2 f4 f8 bfloat16 float8_e4m3fn float8_e5m2 float8_e8m0fnu"
DTYPES: dict[str, np.dtype] = dict(zip(NAMES.split(), map(np.dtype, NUMPY_NAMES.split()), strict=True))
"""The dtypes of tensors by their names in safetensors."""

SURROGATE = re.compile("[\ud800-\udfff]")
"""JSON can spell these characters, UTF-8 cannot."""

JSON = "JSON, not weights: probably an error message of the server; download the file again"


class Tensor(NamedTuple):
    """Location of a tensor: `nbytes` bytes at `offset` of `file`; `dtype` is the safetensors name."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.name} is {self.dtype} {list(self.shape)}"


def make_tensor(name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor that has no place in a file."""
    return Tensor(name, Path(), dtype, shape, 0, math.prod(shape) * DTYPES[dtype].itemsize)


class Header(NamedTuple):
    """The tensors of one file, the file's identity, and the SHA-256 of the JSON text."""

    tensors: tuple[Tensor, ...]
    file_id: FileId
    sha256: str


def read_header(file: Path) -> Header:
    """Read and check the header of `file`. Raises CheckpointError listing everything wrong with it, or OSError."""
    with open_watched(file) as descriptor:
        file_id = identify(descriptor)
        start = os.pread(descriptor, 64, 0)
        try:
            text = _read_header_text(descriptor, start, file_id.size)
            limits = JsonLimits(MAX_TENSORS + 2, 2 * MAX_TENSORS, 6 * MAX_TENSORS)
            tensors, problems = _parse_header(parse_json(text, limits), file, 8 + len(text), file_id.size)
        except CheckpointError as malformed:
            foreign = None if start[8:9] == b"{" else JSON if start.startswith(b"{") else recognize_content(start)
            raise CheckpointError(f"{file} is {foreign}" if foreign else f"{file}: {malformed}") from None
    if problems:
        count = pluralize(len(problems), "problem")
        raise CheckpointError(f"{file} has a malformed header ({count}): {listing(problems, 20)}")
    return Header(tensors, file_id, hashlib.sha256(text).hexdigest())


def _read_header_text(descriptor: int, start: bytes, size: int) -> bytes:
    if size < 10:
        raise CheckpointError(f"{size} bytes long, too short for a safetensors file" if size else "empty (0 bytes)")
    (length,) = struct.unpack("<Q", start[:8])
    if length > size - 8:
        raise CheckpointError(f"its header claims {length} bytes, but the file has {size}")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"its header has {length} bytes, above the limit of {MAX_HEADER_BYTES}")
    text = os.pread(descriptor, length, 8)
    if len(text) != length:
        raise CheckpointError(f"only {len(text)} of the header's {length} bytes could be read")
    if not text.startswith(b"{"):
        raise CheckpointError("its header does not start with {")
    return text


def _parse_header(header: Any, file: Path, begin: int, size: int) -> tuple[tuple[Tensor, ...], list[str]]:
    """Return the tensors of `header` and a list of problems. `begin` is where the tensors' bytes start."""
    metadata = header.pop("__metadata__", {})
    problems = []
    texts = [*metadata, *metadata.values()] if isinstance(metadata, dict) else [None]
    if not all(isinstance(text, str) and not SURROGATE.search(text) for text in texts):
        problems.append("__metadata__ is not an object of strings")
    if len(header) > MAX_TENSORS:
        return (), [f"{len(header)} tensors, above the limit of {MAX_TENSORS} for one file"]
    found = []
    for name, entry in header.items():
        if problem := _find_problem(name, entry):
            problems.append(f"tensor {ascii(name[:80])}: {problem}")
            continue
        first, last = entry["data_offsets"]
        found.append(Tensor(name, file, entry["dtype"], tuple(entry["shape"]), begin + first, last - first))
    if not problems:
        problems = _check_layout(sorted(found, key=operator.attrgetter("offset", "nbytes")), begin, size)
    return tuple(found), problems


def _find_problem(name: str, entry: Any) -> str | None:
    """Return the first problem of one tensor's entry."""
    if not name.isprintable() or not name:
        return "the name has characters that cannot be printed"
    if len(name) > MAX_NAME_BYTES // 4 and len(name.encode()) > MAX_NAME_BYTES:
        return f"the name has {len(name.encode())} bytes, above the limit of {MAX_NAME_BYTES}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return "the entry does not have exactly dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"dtype {ascii(dtype)[:40]} is not supported (supported: {', '.join(DTYPES)})"
    try:
        expected = _nbytes(dtype, *shape) if isinstance(shape, list) else None
    except TypeError:  # not hashable
        expected = None
    if expected is None:
        return f"shape {str(shape)[:80]} is not a list of at most {MAX_RANK} sizes, or is too large"
    first, last = offsets if isinstance(offsets, list) and len(offsets) == 2 else (None, None)
    if type(first) is not int or type(last) is not int or not 0 <= first <= last <= MAX_BYTES:
        return f"data_offsets {str(offsets)[:80]} are not two ascending positions"
    if last - first != expected:
        return f"data_offsets {offsets} span {last - first} bytes, {dtype} {shape} needs {expected}"
    return None


@functools.lru_cache(maxsize=4096, typed=True)
def _nbytes(dtype: str, *shape: Any) -> int | None:
    """Return the size of a tensor in bytes, None if it has no valid shape. A checkpoint has few distinct shapes."""
    if len(shape) > MAX_RANK or not all(type(size) is int and 0 <= size <= MAX_BYTES for size in shape):
        return None
    is_small = math.prod(max(size, 1) for size in shape) * DTYPES[dtype].itemsize <= MAX_BYTES
    return math.prod(shape) * DTYPES[dtype].itemsize if is_small else None


def _check_layout(tensors: list[Tensor], begin: int, size: int) -> list[str]:
    """List overlaps, holes, and missing or surplus bytes of `tensors`, which are in the order of their offsets."""
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
