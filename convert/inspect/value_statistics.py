"""What the values of a weight are like, from its stored components: amax, odd scales, how often each code occurs."""

import collections
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from dsv32_jax.checkpoint.arrays import raw
from dsv32_jax.quantization.quantize import E2M1

from ..transform.amax import amax
from ..transform.facts import scale_facts

PIECE = 1 << 20
"""Bytes counted together."""

E4M3 = np.arange(128, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


class Tally:
    """Adds up the pieces of one weight."""

    def __init__(self):
        self.amax = 0.0
        self.nan_scales = self.zero_blocks = self.zeros = self.not_finite = 0
        self.codes: collections.Counter[str] = collections.Counter()
        self.scale_exponents: collections.Counter[int] = collections.Counter()

    def add(self, parts: Mapping[str, np.ndarray]) -> None:
        """Take in components (manifest.COMPONENTS) of one rank, NVFP4 with a tensor scale for each matrix."""
        self._add_magnitude(dict(parts))
        odd = scale_facts(dict(parts))
        self.nan_scales += odd.get("nan_scale_bytes", 0)
        self.zero_blocks += odd.get("zero_blocks", 0)
        if "codes" in parts:
            counts = nibbles(byte_counts(parts["codes"]))
            self.codes.update({f"{value:g}": int(count) for value, count in zip(E2M1, counts, strict=True)})
            self.zeros += int(counts[0] + counts[8])
            self.scale_exponents.update(_e4m3_exponents(byte_counts(parts["block_scale"])))
            return
        self.zeros += int(np.count_nonzero(parts["values"] == 0))
        if "block_scale" in parts:
            self.codes.update({f"2^{e}": n for e, n in _e4m3_exponents(byte_counts(parts["values"])).items()})
            self.scale_exponents.update(_exponents(parts["block_scale"]))

    def _add_magnitude(self, parts: dict[str, np.ndarray]) -> None:
        """NaN and infinity are counted, and amax is that of the others."""
        if "values" in parts:
            values = parts["values"]
            finite = np.isfinite(values)
            self.not_finite += int(finite.size - np.count_nonzero(finite))
            parts = {**parts, "values": np.where(finite, values, np.zeros((), values.dtype))}
        self.amax = max(self.amax, amax(parts))

    def result(self) -> dict[str, Any]:
        """The sums. `codes`: E2M1 values, or powers of two of FP8 values, with counts; exponents are of two."""
        return {
            "amax": self.amax,
            "not_finite": self.not_finite,
            "zeros": self.zeros,
            "zero_blocks": self.zero_blocks,
            "nan_scales": self.nan_scales,
            "codes": dict(self.codes),
            "scale_exponents": {
                str(exponent): self.scale_exponents[exponent] for exponent in sorted(self.scale_exponents)
            },
        }


def byte_counts(array: np.ndarray) -> np.ndarray:
    """How often each of the 256 bytes occurs."""
    flat, counts = np.frombuffer(raw(array), np.uint8), np.zeros(256, np.int64)
    for at in range(0, flat.size, PIECE):
        counts += np.bincount(flat[at : at + PIECE], minlength=256)
    return counts


def nibbles(counts: np.ndarray) -> np.ndarray:
    """How often each of the 16 codes occurs, from the counts of bytes of two."""
    byte = np.arange(256)
    return np.bincount(byte & 15, counts, 16).astype(np.int64) + np.bincount(byte >> 4, counts, 16).astype(np.int64)


def _e4m3_exponents(counts: np.ndarray) -> collections.Counter[int]:
    """The exponents of E4M3 numbers, from the counts of their bytes; zero and NaN have none."""
    magnitudes = counts[:128] + counts[128:]
    exponents = np.frexp(E4M3[1:127])[1] - 1
    found: collections.Counter[int] = collections.Counter()
    for exponent, count in zip(exponents.tolist(), magnitudes[1:127].tolist(), strict=True):
        if count:
            found[exponent] += count
    return found


def _exponents(values: np.ndarray) -> collections.Counter[int]:
    """The exponents of floats; zero and what is not finite have none."""
    flat = values.reshape(-1).astype(np.float32)
    flat = np.abs(flat[np.isfinite(flat) & (flat != 0)])
    found, counts = np.unique(np.frexp(flat)[1] - 1, return_counts=True)
    return collections.Counter(dict(zip(found.tolist(), counts.tolist(), strict=True)))
