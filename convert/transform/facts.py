"""What a leaf's arrays say about themselves: digest, odd but legal scales, values that must not be there."""

import hashlib
from collections.abc import Iterator

import numpy as np

from dsv32_jax.checkpoint.manifest import ArrayEntry
from dsv32_jax.errors import CheckpointError

PIECE = 1 << 20
"""Bytes looked at together: what is made of them stays in the processor's cache."""

EXPONENTS = {"float32": (np.uint32, 0x7F800000), "bfloat16": (np.uint16, 0x7F80), "float16": (np.uint16, 0x7C00)}


def entry(array: np.ndarray) -> ArrayEntry:
    """dtype, shape and SHA-256 of a C-contiguous array."""
    return ArrayEntry(array.dtype.name, array.shape, hashlib.sha256(_bytes(array).data).hexdigest())


def scale_facts(arrays: dict[str, np.ndarray]) -> dict[str, int]:
    """How many NVFP4 block scales are NaN (they count as 448), and how many blocks are zero: by their scale, or by all
    of their codes."""
    if "codes" not in arrays:
        return {}
    nan = zero = 0
    scales = _bytes(arrays["block_scale"])
    codes = _bytes(arrays["codes"]).reshape(scales.size, -1)
    for at in range(0, scales.size, PIECE // codes.shape[1]):
        some = slice(at, at + PIECE // codes.shape[1])
        magnitude = scales[some] & 0x7F
        nan += int(np.count_nonzero(magnitude == 0x7F))
        zero += int(np.count_nonzero((magnitude == 0) | ~(codes[some] & 0x77).any(axis=1)))
    return {"nan_scale_bytes": nan, "zero_blocks": zero}


def require_finite(path: str, arrays: dict[str, np.ndarray]) -> None:
    """Raise CheckpointError when a float array or FP8 values have NaN or infinity (NVFP4 block scales may)."""
    for name, array in arrays.items():
        if array.dtype.name in EXPONENTS:
            unsigned, mask = EXPONENTS[array.dtype.name]
            bits = _bytes(array).view(unsigned)
        elif array.dtype.name == "float8_e4m3fn" and name == "values":
            bits, mask = _bytes(array), 0x7F
        else:
            continue
        if count := sum(int(np.count_nonzero((piece & mask) == mask)) for piece in _pieces(bits)):
            raise CheckpointError(
                f"{path}.{name} ({array.dtype.name} {list(array.shape)}) has {count} values that are NaN or infinite: "
                "the source is damaged. What was written before is kept"
            )


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _pieces(flat: np.ndarray) -> Iterator[np.ndarray]:
    return (flat[at : at + PIECE] for at in range(0, flat.size, PIECE))
