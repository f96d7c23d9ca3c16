"""Quantization to NVFP4 and FP8 on the host, in NumPy; `formats` explains the formats.

Rounding equals ModelOpt's bit for bit: every quotient is one float32 division, and ties go to the even code. Arrays are
processed in pieces that stay in a core's cache. Within a piece a block is a column of a [16, blocks] array, so that
each step is one long vector operation instead of thousands of short ones.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

NVFP4_BLOCK = 16
FP8_BLOCK = 128
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_TINY = 2.0**-9
"""The smallest positive float8_e4m3fn."""

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
E2M1_PAIR = np.stack([E2M1[np.arange(256) & 15], E2M1[np.arange(256) >> 4]], axis=-1)
"""The two values of every byte, the low nibble first."""

_HALFWAY = (E2M1[:7] + E2M1[1:8]) / 2
E2M1_LAST = np.where(np.arange(7) % 2, np.nextafter(_HALFWAY, np.float32(0)), _HALFWAY)
"""The largest quotients with the codes 0, 1, ... 6: halfway to the next, where a tie goes to the even code."""

E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
E4M3_AS_SCALE = np.where(np.isnan(E4M3), np.float32(E4M3_MAX), E4M3)
"""The value of every byte, and its value as a block scale of NVFP4, where NaN counts as 448."""

SMALLEST_TENSOR_SCALE = np.float32(2.0**-117)
"""The product with the smallest block scale is a normal float32. Only matrices below 1e-32 throughout are affected."""

PIECE = 1 << 17
"""Weights in a piece, the fastest power of two with 1 MiB of cache a core."""


class Scaling(NamedTuple):
    """A way to choose the scales of NVFP4 blocks.

    `largest`: the block scale of the matrix's largest element, which determines the tensor scale.
    `choose`: returns the float8_e4m3fn scales [n], positive and finite, of magnitudes [16, n] and a tensor scale.
    """

    largest: float
    choose: Callable[[np.ndarray, np.float32], np.ndarray]


def nearest_scale(magnitude: np.ndarray, tensor_scale: np.float32) -> np.ndarray:
    """Return the scale that maps each block's largest element to 6, and 1 for a block of zeros."""
    return scale_for(magnitude.max(axis=0), E2M1_MAX, tensor_scale)


def scale_for(block_amax: np.ndarray, target: float, tensor_scale: np.float32) -> np.ndarray:
    """Return the float8_e4m3fn scale that maps `block_amax` to `target`, and 1 for zero."""
    scale = block_amax / np.float32(np.float32(target) * tensor_scale)
    scale[scale == 0] = 1
    return np.clip(scale, np.float32(E4M3_TINY), np.float32(E4M3_MAX)).astype(ml_dtypes.float8_e4m3fn)


RTN = Scaling(E4M3_MAX, nearest_scale)
"""Round to nearest, ModelOpt's default."""


def nvfp4_quantize(
    w: np.ndarray, scaling: Scaling = RTN, amax: np.float32 | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes, block scales and tensor scale of a matrix w [..., in] of any float dtype.

    `amax` is the magnitude that determines the tensor scale, by default the largest of `w`; matrices may share one.
    Raises ValueError unless the input axis is a multiple of 16 and all values are finite.
    """
    if w.shape[-1] % NVFP4_BLOCK:
        raise ValueError(f"NVFP4 needs an input axis that is a multiple of {NVFP4_BLOCK}, not {w.shape[-1]}")
    tensor_scale = _tensor_scale(largest(w) if amax is None else amax, scaling)
    blocks = w.reshape(-1, NVFP4_BLOCK)
    codes = np.empty((len(blocks), NVFP4_BLOCK // 2), np.uint8)
    block_scale = np.empty(len(blocks), ml_dtypes.float8_e4m3fn)
    for piece in _pieces(len(blocks), NVFP4_BLOCK):
        rows = blocks[piece].astype(np.float32)
        x = rows.T.copy()
        magnitude = np.abs(x, out=rows.reshape(x.shape))
        scale = block_scale[piece] = scaling.choose(magnitude, tensor_scale)
        magnitude /= E4M3[scale.view(np.uint8)] * tensor_scale
        codes[piece] = pack_codes(magnitude, x).T
    shape = w.shape[:-1]
    return (
        codes.reshape(*shape, -1),
        block_scale.reshape(*shape, -1),
        np.full((1,) * w.ndim, tensor_scale, np.float32),
    )


def largest(w: np.ndarray) -> np.float32:
    """Return the largest magnitude in `w`. Raises ValueError with the number of values that are not finite."""
    flat, found = w.reshape(-1), np.float32(0)
    for piece in _pieces(flat.size, 1):
        x = flat[piece].astype(np.float32, copy=False)
        found = np.maximum(found, np.maximum(x.max(), -x.min()))
    if np.isfinite(found):
        return found
    count = sum(np.count_nonzero(~np.isfinite(flat[piece].astype(np.float32))) for piece in _pieces(flat.size, 1))
    raise ValueError(f"{count} of {w.size} values are not finite; nothing was quantized")


def _tensor_scale(amax: np.float32, scaling: Scaling) -> np.float32:
    if not amax:
        return np.float32(1)
    return np.maximum(np.float32(amax / np.float32(E2M1_MAX * scaling.largest)), SMALLEST_TENSOR_SCALE)


def pack_codes(quotient: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Pack elements with the magnitudes `quotient` [16, n], at most 6, and the signs of `x` into bytes [8, n]."""
    codes = (quotient > E2M1_LAST[0]).view(np.uint8)
    flags = np.empty(x.shape, np.bool_)
    for last in E2M1_LAST[1:]:
        codes += np.greater(quotient, last, out=flags).view(np.uint8)
    codes |= np.signbit(x, out=flags).view(np.uint8) << 3
    return codes[0::2] | codes[1::2] << 4


def nvfp4_dequantize(
    codes: np.ndarray, block_scale: np.ndarray, tensor_scale: np.ndarray, dtype: Any = np.float32
) -> np.ndarray:
    """Return the values [..., in] of an NVFP4 weight, exact in float32 or rounded from it to `dtype`.

    A NaN scale counts as 448.
    """
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    factor = np.broadcast_to(tensor_scale, (*shape[:-1], 1)).reshape(-1, 1)
    codes, scales = codes.reshape(-1, codes.shape[-1]), block_scale.view(np.uint8).reshape(-1, block_scale.shape[-1])
    out = np.empty((len(codes), shape[-1]), dtype)
    table = E2M1_PAIR.view(np.uint64)[:, 0]
    for rows in _pieces(len(codes), shape[-1]):
        values = table.take(codes[rows]).view(np.float32).reshape(*scales[rows].shape, -1)
        values *= E4M3_AS_SCALE.take(scales[rows])[..., None]
        out[rows] = values.reshape(-1, shape[-1]) * factor[rows]
    return out.reshape(shape)


def fp8_quantize(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return FP8 values [out, in] of a matrix and its grid of 128x128 scales, float32 powers of two that multiply.

    Raises ValueError if values are not finite.
    """
    largest(w)
    out, width = w.shape
    columns = np.arange(0, width, FP8_BLOCK)
    values = np.empty(w.shape, ml_dtypes.float8_e4m3fn)
    grid = np.empty((-(-out // FP8_BLOCK), len(columns)), np.float32)
    for band in range(len(grid)):
        rows = slice(band * FP8_BLOCK, (band + 1) * FP8_BLOCK)
        x = w[rows].astype(np.float32)
        amax = np.maximum.reduceat(np.abs(x).max(axis=0), columns)
        grid[band] = np.exp2(np.ceil(np.log2(np.maximum(amax, np.float32(1e-4)) / np.float32(E4M3_MAX))))
        x /= np.repeat(grid[band], FP8_BLOCK)[:width]
        values[rows] = np.clip(x, -E4M3_MAX, E4M3_MAX, out=x).astype(ml_dtypes.float8_e4m3fn)
    return values, grid


def fp8_dequantize(values: np.ndarray, row_scale: np.ndarray, dtype: Any = np.float32) -> np.ndarray:
    """Return the values, rounded to bfloat16, of FP8 values [..., in] with a scale per row and 128 inputs."""
    width = values.shape[-1]
    codes, scales = values.view(np.uint8).reshape(-1, width), row_scale.reshape(-1, row_scale.shape[-1])
    out = np.empty(codes.shape, dtype)
    for rows in _pieces(len(codes), width):
        product = E4M3.take(codes[rows])
        product *= np.repeat(scales[rows], FP8_BLOCK, axis=-1)[:, :width]
        out[rows] = product.astype(ml_dtypes.bfloat16)
    return out.reshape(values.shape)


def _pieces(count: int, size: int) -> Iterator[slice]:
    """Yield slices of `count` items of `size` weights each, about PIECE weights at a time."""
    step = max(PIECE // size, 1)
    return (slice(at, at + step) for at in range(0, count, step))
