"""One weight in its target format: as it is stored, or quantized or dequantized, and how far that is from the source.

A matrix is quantized whole, before it is cut into leaves, because its tensor scale belongs to all of it. FP8 goes to
NVFP4 by way of bfloat16, as in ModelOpt; NVFP4 goes anywhere by way of its exact float32 values.
"""

import collections
import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dsv32_jax.errors import CheckpointError
from dsv32_jax.layout import fold_expert, split_layer
from dsv32_jax.quantization.quantize import (
    FP8_BLOCK,
    RTN,
    Scaling,
    fp8_dequantize,
    fp8_quantize,
    largest,
    nvfp4_dequantize,
    nvfp4_quantize,
)

from ..read.weights import Read, StoredWeight, read_components

PIECE_WEIGHTS = 1 << 17
PIECE_BYTES = 1 << 20
"""Worked on together, so that what is made of them stays in a core's cache."""

FUSED = (("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"))
"""Linears of the same input, which kernels fuse."""

WORST = 5


def dequantize(components: dict[str, np.ndarray]) -> np.ndarray:
    """Return exact values: float32 of NVFP4, bfloat16 of FP8 (which is defined by it), dense arrays as they are."""
    if "codes" in components:
        return nvfp4_dequantize(components["codes"], components["block_scale"], components["tensor_scale"])
    if "block_scale" in components:
        return fp8_dequantize(components["values"], components["block_scale"], ml_dtypes.bfloat16)
    return components["values"]


class ErrorStats(NamedTuple):
    """The squared error that converting one matrix made, its squared norm, and the odd NVFP4 scales of the source."""

    squared_error: float
    squared_norm: float
    nan_scale_bytes: int = 0
    zero_blocks: int = 0


class Requantizer:
    """Loads weights in their target formats and collects the ErrorStats of each that changes, by name.

    `scaling`: how NVFP4 block scales are chosen. `pairs`: weights that share a tensor scale (both become NVFP4).
    """

    def __init__(self, scaling: Scaling = RTN, pairs: Iterable[tuple[StoredWeight, StoredWeight]] = ()):
        self.errors: dict[str, ErrorStats] = {}
        self._scaling = scaling
        self._partners = {one.name: other for pair in pairs for one, other in (pair, pair[::-1])}
        self._amax: dict[str, np.float32] = {}

    def load(self, stored: StoredWeight, read: Read) -> dict[str, np.ndarray]:
        """Return the components (manifest.COMPONENTS) of a weight in the format `stored.becomes`.

        Raises CheckpointError, naming the weight, if its values cannot be quantized.
        """
        if stored.wanted is None or stored.is_in(stored.wanted):
            return read_components(stored, read)
        partner_amax = self._read_partner_amax(stored, read)
        components = read_components(stored, read)
        values = _dequantize_whole(stored, components, read)
        with _name_in_errors(stored):
            result = self._convert(stored, values, partner_amax)
        self.errors[stored.name] = _compare(values, result, count_odd_scales(components))
        return result

    def take_errors(self) -> dict[str, ErrorStats]:
        """Return the errors since the last call."""
        taken, self.errors = self.errors, {}
        return taken

    def _convert(self, stored: StoredWeight, values: np.ndarray, partner_amax: np.float32) -> dict[str, np.ndarray]:
        match stored.wanted:
            case "nvfp4":
                amax = self._amax[stored.name] = largest(values)
                codes, block_scale, tensor_scale = nvfp4_quantize(values, self._scaling, max(amax, partner_amax))
                return {"codes": codes, "block_scale": block_scale, "tensor_scale": tensor_scale}
            case "fp8":
                quantized, grid = fp8_quantize(values)
                return {"values": quantized, "block_scale": np.repeat(grid, FP8_BLOCK, axis=0)[: len(quantized)]}
            case _:
                return {"values": values.astype(ml_dtypes.bfloat16, copy=False)}

    def _read_partner_amax(self, stored: StoredWeight, read: Read) -> np.float32:
        """Return the largest magnitude of the weight's partner, 0 without one; it is read for it at most once."""
        partner = self._partners.get(stored.name)
        if partner is None:
            return np.float32(0)
        if partner.name not in self._amax:
            values = _dequantize_whole(partner, read_components(partner, read), read)
            with _name_in_errors(partner):
                self._amax[partner.name] = largest(values)
        return self._amax[partner.name]


def _dequantize_whole(stored: StoredWeight, components: dict[str, np.ndarray], read: Read) -> np.ndarray:
    """Return the matrix [out, in] of the `components` that `read_components` returned, its factors folded in."""
    matrix = dequantize(components)
    if stored.lora:
        a, b = (read(tensor).astype(np.float32) for tensor in stored.lora)
        matrix += b @ a
    if stored.pre_quant_scale is not None:
        matrix *= read(stored.pre_quant_scale).astype(np.float32)
    return matrix


@contextlib.contextmanager
def _name_in_errors(stored: StoredWeight) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{stored.name}: {error}. What was written so far is kept") from error


def find_pairs(weights: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Return the pairs among `weights`, however described, whose names say that kernels fuse them; as in FUSED."""
    by_name = {weight.name: weight for weight in weights}
    pairs = []
    for name, weight in by_name.items():
        stem, _, last = name.removesuffix(".weight").rpartition(".")
        names = [f"{stem}.{second}.weight" for first, second in FUSED if first == last]
        pairs += [(weight, by_name[other]) for other in names if other in by_name]
    return pairs


def _compare(values: np.ndarray, result: dict[str, np.ndarray], odd_scales: dict[str, int]) -> ErrorStats:
    """Measure how far `result` is from `values` [out, in] or [out]."""
    rows = max(PIECE_WEIGHTS // max(values[:1].size, 1), 1)
    squared_error = squared_norm = 0.0
    for at in range(0, len(values), rows):
        piece = {name: array if name == "tensor_scale" else array[at : at + rows] for name, array in result.items()}
        expected = values[at : at + rows].astype(np.float32)
        error = dequantize(piece).astype(np.float32)
        error -= expected
        error *= error
        expected *= expected
        squared_error, squared_norm = squared_error + float(error.sum()), squared_norm + float(expected.sum())
    return ErrorStats(squared_error, squared_norm, **odd_scales)


def count_odd_scales(components: dict[str, np.ndarray]) -> dict[str, int]:
    """Count NVFP4 block scales that are NaN (they mean 448), and blocks that are zero by their scale or all codes."""
    if "codes" not in components:
        return {}
    nan = zero = 0
    scales = components["block_scale"].reshape(-1).view(np.uint8)
    codes = components["codes"].reshape(scales.size, -1)
    step = max(PIECE_BYTES // codes.shape[1], 1)
    words = codes.view(f"u{math.gcd(codes.shape[1], 8)}")
    magnitudes = words.dtype.type(int.from_bytes(b"\x77" * words.itemsize))
    for at in range(0, scales.size, step):
        magnitude = scales[at : at + step] & 0x7F
        nan += int(np.count_nonzero(magnitude == 0x7F))
        values = reduce(np.bitwise_or, words[at : at + step].T) & magnitudes
        zero += int(np.count_nonzero((magnitude == 0) | (values == 0)))
    return {"nan_scale_bytes": nan, "zero_blocks": zero}


def summarize_errors(errors: Mapping[str, ErrorStats]) -> dict[str, Any]:
    """Return for each kind of weight how many were converted and their relative RMS error, and the worst weights.

    Relative RMS is ||after - before|| / ||before||, never the mean of |after - before| / |before|: a correct NVFP4
    quantizer has 18 % of that and 9.5 % of this, because weights that become zero count as 100 %.
    """
    kinds: dict[str, list[ErrorStats]] = {}
    for name, stats in errors.items():
        kind = fold_expert(split_layer(name)[1]).removesuffix(".weight")
        kinds.setdefault(kind, []).append(stats)
    worst = sorted(errors, key=lambda name: (-relative_rms([errors[name]]), name))[:WORST]
    return {
        "kinds": {
            name: {"weights": len(found), "relative_rms": relative_rms(found)} for name, found in sorted(kinds.items())
        },
        "worst": {name: relative_rms([errors[name]]) for name in worst},
    }


def relative_rms(errors: list[ErrorStats]) -> float:
    """Return the relative RMS error of several weights together; 0 if they are zero."""
    norm = sum(stats.squared_norm for stats in errors)
    return math.sqrt(sum(stats.squared_error for stats in errors) / norm) if norm else 0.0


def sum_odd_scales(errors: Mapping[str, ErrorStats]) -> collections.Counter[str]:
    """Count the NaN and zero block scales that were dequantized away."""
    counts: collections.Counter[str] = collections.Counter()
    for stats in errors.values():
        counts.update(nan_scale_bytes=stats.nan_scale_bytes, zero_blocks=stats.zero_blocks)
    return counts
