"""Facts about a leaf's arrays that go into the manifest: checksum, largest magnitude, odd but legal scales.

A leaf's arrays are its components (manifest.COMPONENTS), C-contiguous. They are worked on in pieces that stay in a
core's cache.
"""

import hashlib

import ml_dtypes
import numpy as np

from dsv32_jax.checkpoint.manifest import ArrayEntry
from dsv32_jax.errors import CheckpointError, pluralize
from dsv32_jax.quantization.quantize import E2M1, E4M3, E4M3_AS_SCALE, FP8_BLOCK

PIECE_BYTES = 1 << 20
MAGNITUDE_BYTES = 1 << 24

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
EXPONENTS = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00, "float8_e4m3fn": 0x7F}
"""The bits that are all ones in NaN and infinity (float8_e4m3fn has NaN alone)."""


def describe_array(array: np.ndarray) -> ArrayEntry:
    """Return the dtype, shape and SHA-256 of an array."""
    return ArrayEntry(array.dtype.name, array.shape, hashlib.sha256(_bytes_of(array).data).hexdigest())


def count_odd_scales(components: dict[str, np.ndarray]) -> dict[str, int]:
    """Count NVFP4 block scales that are NaN (they mean 448), and blocks that are zero by their scale or all codes."""
    if "codes" not in components:
        return {}
    nan = zero = 0
    scales = _bytes_of(components["block_scale"])
    codes = _bytes_of(components["codes"]).reshape(scales.size, -1)
    step = PIECE_BYTES // codes.shape[1]
    for at in range(0, scales.size, step):
        magnitude = scales[at : at + step] & 0x7F
        nan += int(np.count_nonzero(magnitude == 0x7F))
        zero += int(np.count_nonzero((magnitude == 0) | ~(codes[at : at + step] & 0x77).any(axis=1)))
    return {"nan_scale_bytes": nan, "zero_blocks": zero}


def require_finite(path: str, components: dict[str, np.ndarray]) -> None:
    """Raise CheckpointError if a float array or FP8 values contain NaN or infinity; NVFP4 block scales may."""
    for name, array in components.items():
        mask = EXPONENTS.get(array.dtype.name)
        if mask is None or (array.dtype.itemsize == 1 and name == "block_scale"):
            continue
        bits = array.reshape(-1).view(UNSIGNED[array.dtype.itemsize])
        pieces = (bits[at : at + PIECE_BYTES] for at in range(0, bits.size, PIECE_BYTES))
        if count := sum(int(np.count_nonzero((piece & mask) == mask)) for piece in pieces):
            raise CheckpointError(
                f"{path}.{name} ({array.dtype.name} {list(array.shape)}) has {pluralize(count, 'value')} that "
                f"{'is' if count == 1 else 'are'} NaN or infinite: the source is damaged. "
                "What was written so far is kept"
            )


def amax(components: dict[str, np.ndarray]) -> float:
    """Return the largest magnitude of a leaf, in the arithmetic of dequantization but without dequantizing."""
    if "codes" in components:
        return _amax_nvfp4(**components)
    if "block_scale" in components:
        return _amax_fp8(**components)
    return _amax_dense(components["values"])


def _amax_dense(values: np.ndarray) -> float:
    """Magnitudes of floats are ordered as their bits are."""
    unsigned = UNSIGNED[values.dtype.itemsize]
    mask, largest = unsigned(np.iinfo(unsigned).max >> 1), unsigned(0)
    bits = values.reshape(-1).view(unsigned)
    step = MAGNITUDE_BYTES // values.dtype.itemsize
    for at in range(0, bits.size, step):
        largest = max(largest, (bits[at : at + step] & mask).max())
    return float(np.array([largest], unsigned).view(values.dtype)[0])


def _amax_nvfp4(codes: np.ndarray, block_scale: np.ndarray, tensor_scale: np.ndarray) -> float:
    """Look only at the blocks of each matrix whose scale is large enough to hold its largest value."""
    matrices = tensor_scale.size
    scales = block_scale.view(np.uint8).reshape(matrices, -1)
    packed = codes.reshape(matrices, scales.shape[1], -1)
    factors = tensor_scale.reshape(-1)
    return float(max(np.float32(_amax_blocks(packed[i], scales[i])) * factors[i] for i in range(matrices)))


def _amax_blocks(packed: np.ndarray, scales: np.ndarray) -> float:
    """Return the largest e2m1 x e4m3 of a matrix: codes [blocks, bytes], scales [blocks] as bytes."""
    magnitude = scales & 0x7F
    best, level = 0.0, int(magnitude.max(initial=0))
    while level and float(E4M3_AS_SCALE[level]) * 6 > best:
        of_level = packed[magnitude == level]
        code = max(int((of_level & 7).max()), int(((of_level >> 4) & 7).max()))
        best = max(best, float(E2M1[code]) * float(E4M3_AS_SCALE[level]))
        magnitude[magnitude == level] = 0
        level = int(magnitude.max())
    return best


def _amax_fp8(values: np.ndarray, block_scale: np.ndarray) -> float:
    """Round to bfloat16, as dequantization does."""
    width = values.shape[-1]
    rows, scales = values.view(np.uint8).reshape(-1, width), block_scale.reshape(-1, block_scale.shape[-1])
    step, best = max(1, MAGNITUDE_BYTES // width), np.float32(0)
    for at in range(0, rows.shape[0], step):
        magnitude = np.maximum.reduceat(rows[at : at + step] & 0x7F, np.arange(0, width, FP8_BLOCK), axis=1)
        best = max(best, (E4M3[magnitude] * np.abs(scales[at : at + step])).max())
    return float(np.asarray(best, np.float32).astype(ml_dtypes.bfloat16))


def _bytes_of(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)
