"""Tensors of a checkpoint folder selected by a pattern: dtype, shape and place, or statistics of their values."""

import collections
import fnmatch
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsv32_jax.checkpoint.folder import WEIGHTS
from dsv32_jax.checkpoint.manifest import Manifest, is_converted
from dsv32_jax.checkpoint.reader import raw
from dsv32_jax.errors import CheckpointError, UsageError, listing
from dsv32_jax.quantization.quantize import E2M1, E4M3
from dsv32_jax.system.files import expand_path

from ..read import weights
from ..read.converted import Converted, raise_damaged
from ..read.source import Source
from ..read.weights import detect, split_weight
from ..transform.requantize import count_odd_scales, dequantize

PIECE = 1 << 20
"""Bytes counted at a time."""


def list_tensors(folder: str | Path, pattern: str) -> list[dict[str, Any]]:
    """Name, dtype, shape, bytes and file of the tensors (in a converted folder: arrays) that match a shell pattern.

    Raises UsageError where none does.
    """
    folder = expand_path(folder).absolute()
    rows = _list_converted(folder, pattern) if is_converted(folder) else _list_source(folder, pattern)
    return list(_require_any(rows, folder, pattern))


def compute_statistics(folder: str | Path, pattern: str) -> Iterator[dict[str, Any]]:
    """Statistics of every weight (in a converted folder: parameter) of which the name or a tensor's name matches.

    Raises UsageError where none does, VerificationError where an array has changed.
    """
    folder = expand_path(folder).absolute()
    rows = _converted_statistics(folder, pattern) if is_converted(folder) else _source_statistics(folder, pattern)
    return _require_any(rows, folder, pattern)


def _require_any(rows: Iterator[dict[str, Any]], folder: Path, pattern: str) -> Iterator[dict[str, Any]]:
    if (first := next(rows, None)) is not None:
        return itertools.chain([first], rows)
    names = list(Manifest.read(folder).leaves if is_converted(folder) else Source(folder).tensors)
    examples = listing(names[len(names) // 3 :: len(names) // 3 + 1], 3)
    raise UsageError(f"no tensor of {folder} matches {pattern}. Names look like {examples}; quote the pattern")


def _list_source(folder: Path, pattern: str) -> Iterator[dict[str, Any]]:
    for name, tensor in Source(folder).tensors.items():
        if fnmatch.fnmatchcase(name, pattern):
            yield _row(name, tensor.dtype, tensor.shape, tensor.nbytes, tensor.file.name)


def _list_converted(folder: Path, pattern: str) -> Iterator[dict[str, Any]]:
    converted = Converted(folder)
    for key, entry in converted.expected.items():
        name = ".".join(key)
        if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(key[0], pattern):
            place = "missing" if converted.arrays.find_problems([key]) else f"{WEIGHTS}/{entry.part}"
            yield _row(name, entry.dtype, entry.shape, entry.nbytes, place)


def _row(name: str, dtype: str, shape: tuple[int, ...], nbytes: int, place: str) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape), "bytes": nbytes, "place": place}


def _source_statistics(folder: Path, pattern: str) -> Iterator[dict[str, Any]]:
    source = Source(folder)
    names = (split_weight(name)[0] for name in source.tensors if fnmatch.fnmatchcase(name, pattern))
    for name in dict.fromkeys(names):
        try:
            stored = detect(name, source.tensors)
        except CheckpointError:
            continue
        statistics = summarize_values([weights.read_components(stored, source.read)])
        yield {"name": stored.name, "format": stored.format, "shape": list(stored.shape), **statistics}


def _converted_statistics(folder: Path, pattern: str) -> Iterator[dict[str, Any]]:
    converted = Converted(folder)
    for group in converted.groups:
        for i, leaf in enumerate(group.leaves):
            entry = converted.manifest.leaves[leaf.path]
            names = [leaf.path, *(f"{leaf.path}.{name}" for name in entry.arrays)]
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                matrices = (parts[i] for _, parts in converted.read(group, raise_damaged))
                statistics = summarize_values(matrices)
                yield {"name": leaf.path, "format": entry.format, "shape": list(leaf.shape), **statistics}


def summarize_values(matrices: Iterable[Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Statistics of one weight, from the components (manifest.COMPONENTS) of its matrices, one per expert.

    `amax` is that of finite values; `codes` are E2M1 values, or powers of two of FP8 values, with their counts.
    """
    largest, codes, exponents = 0.0, collections.Counter[str](), collections.Counter[int]()
    totals = collections.Counter(not_finite=0, zeros=0, zero_blocks=0, nan_scales=0)
    for matrix in matrices:
        parts = {name: np.ascontiguousarray(array) for name, array in matrix.items()}
        if "codes" in parts:
            counts, odd = count_nibbles(count_bytes(parts["codes"])), count_odd_scales(parts)
            codes.update({f"{value:g}": int(count) for value, count in zip(E2M1, counts, strict=True)})
            exponents.update(_count_exponents(E4M3, count_bytes(parts["block_scale"])))
            zeros = int(counts[0] + counts[8])
            totals.update(zeros=zeros, zero_blocks=odd["zero_blocks"], nan_scales=odd["nan_scale_bytes"])
        else:
            values = parts["values"]
            finite = np.isfinite(values)
            totals.update(zeros=int(np.count_nonzero(values == 0)), not_finite=int(np.count_nonzero(~finite)))
            if "block_scale" in parts:
                codes.update({f"2^{e}": n for e, n in _count_exponents(E4M3, count_bytes(values)).items()})
                exponents.update(_count_exponents(parts["block_scale"]))
            parts["values"] = np.where(finite, values, np.zeros((), values.dtype))
        largest = max(largest, float(np.abs(dequantize(parts)).max(initial=0)))
    scale_exponents = {str(exponent): count for exponent, count in sorted(exponents.items())}
    return {"amax": largest, **totals, "codes": dict(codes), "scale_exponents": scale_exponents}


def count_bytes(array: np.ndarray) -> np.ndarray:
    """How often each of the 256 bytes occurs."""
    flat, counts = np.frombuffer(raw(array), np.uint8), np.zeros(256, np.int64)
    for at in range(0, flat.size, PIECE):
        counts += np.bincount(flat[at : at + PIECE], minlength=256)
    return counts


def count_nibbles(counts: np.ndarray) -> np.ndarray:
    """How often each of the 16 codes occurs, from the counts of bytes that hold two."""
    byte = np.arange(256)
    return np.bincount(byte & 15, counts, 16).astype(np.int64) + np.bincount(byte >> 4, counts, 16).astype(np.int64)


def _count_exponents(values: np.ndarray, counts: np.ndarray | None = None) -> dict[int, int]:
    """Count the exponents of floats, except zero and values that are not finite; `counts`: how often each occurs."""
    flat = values.reshape(-1).astype(np.float32)
    counts = np.ones(flat.size, np.int64) if counts is None else counts
    known = np.isfinite(flat) & (flat != 0) & (counts > 0)
    exponents, places = np.unique(np.frexp(flat[known])[1] - 1, return_inverse=True)
    totals = np.bincount(places, counts[known]).astype(np.int64)
    return dict(zip(exponents.tolist(), totals.tolist(), strict=True))
