"""The largest magnitude of a stored weight, without dequantizing it."""

import ml_dtypes
import numpy as np

from dsv32_jax.quantization.quantize import E2M1, FP8_BLOCK

PIECE = 1 << 24
"""Bytes looked at together."""

NAN, LARGEST = 0x7F, 0x7E
"""E4M3 without its sign: NaN, which counts as the largest scale, and the largest finite number."""

E4M3 = np.arange(128, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def amax(arrays: dict[str, np.ndarray]) -> float:
    """The largest magnitude that the components `arrays` of one leaf stand for, in the arithmetic of dequantizing."""
    if "codes" in arrays:
        return _nvfp4(**arrays)
    if "block_scale" in arrays:
        return _fp8(**arrays)
    return _dense(arrays["values"])


def _dense(values: np.ndarray) -> float:
    """Magnitudes of floats are ordered as their bits are."""
    unsigned = BITS[values.dtype.itemsize]
    mask, largest = unsigned(np.iinfo(unsigned).max >> 1), unsigned(0)
    flat = values.reshape(-1).view(unsigned)
    step = PIECE // values.dtype.itemsize
    for at in range(0, flat.size, step):
        largest = max(largest, (flat[at : at + step] & mask).max())
    return float(np.array([largest], unsigned).view(values.dtype)[0])


def _nvfp4(codes: np.ndarray, block_scale: np.ndarray, tensor_scale: np.ndarray) -> float:
    """The larger a block's scale, the larger its values can be: only blocks that can hold the largest are looked at."""
    matrices = tensor_scale.size
    scales = block_scale.view(np.uint8).reshape(matrices, -1)
    packed = codes.reshape(matrices, scales.shape[1], -1)
    products = [
        np.float32(_largest_block(packed[i], scales[i])) * scale for i, scale in enumerate(tensor_scale.reshape(-1))
    ]
    return float(max(products))


def _largest_block(packed: np.ndarray, scales: np.ndarray) -> float:
    """The largest e2m1 x e4m3 of a matrix: codes [blocks, bytes], scales [blocks] as bytes."""
    magnitude = scales & 0x7F
    magnitude[magnitude == NAN] = LARGEST
    best, level = 0.0, int(magnitude.max(initial=0))
    while level and float(E4M3[level]) * 6 > best:
        of_level = packed[magnitude == level]
        code = max(int((of_level & 7).max()), int(((of_level >> 4) & 7).max()))
        best = max(best, float(E2M1[code]) * float(E4M3[level]))
        magnitude[magnitude == level] = 0
        level = int(magnitude.max())
    return best


def _fp8(values: np.ndarray, block_scale: np.ndarray) -> float:
    """Rounded to bfloat16, as the values are."""
    width = values.shape[-1]
    rows, scales = values.view(np.uint8).reshape(-1, width), block_scale.reshape(-1, block_scale.shape[-1])
    step, best = max(1, PIECE // width), np.float32(0)
    for at in range(0, rows.shape[0], step):
        magnitude = rows[at : at + step] & 0x7F
        starts = np.arange(0, width, FP8_BLOCK)
        blocks = E4M3[np.maximum.reduceat(magnitude, starts, axis=1)] * np.abs(scales[at : at + step])
        best = max(best, blocks.max())
    return float(np.asarray(best, np.float32).astype(ml_dtypes.bfloat16))
