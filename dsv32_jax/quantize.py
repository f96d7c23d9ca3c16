"""NVFP4 and FP8 on the host, in NumPy alone: what the converter and the checks use (`formats` explains the formats).

Rounding follows ModelOpt bit for bit: every quotient is one float32 division, ties go to the even code.
"""

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
"""The two values of every byte: the low nibble is the first element."""


def nvfp4_quantize(w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The NVFP4 components of one matrix w [..., in]: round to nearest even, one float32 scale for all of it.

    in must be a multiple of 16; raises ValueError on that and on values that are not finite.
    """
    w = np.asarray(w, np.float32)
    if w.shape[-1] % NVFP4_BLOCK:
        raise ValueError(f"NVFP4 needs an input axis that is a multiple of {NVFP4_BLOCK}, not {w.shape[-1]}")
    _require_finite(w)
    amax = np.float32(np.abs(w).max(initial=0.0))
    tensor_scale = np.float32(amax / np.float32(E2M1_MAX * E4M3_MAX)) if amax else np.float32(1)
    blocks = w.reshape(*w.shape[:-1], -1, NVFP4_BLOCK)
    block_scale = _block_scale(np.abs(blocks).max(axis=-1), tensor_scale)
    step = block_scale.astype(np.float32) * tensor_scale
    elements = (blocks / step[..., None]).astype(ml_dtypes.float4_e2m1fn).view(np.uint8).reshape(w.shape) & 15
    codes = elements[..., 0::2] | elements[..., 1::2] << 4
    return codes, block_scale, np.full((1,) * w.ndim, tensor_scale, np.float32)


def _block_scale(block_amax: np.ndarray, tensor_scale: np.float32) -> np.ndarray:
    """The E4M3 scale that brings a block's largest element to 6; 1 for a block of zeros."""
    scale = block_amax / np.float32(np.float32(E2M1_MAX) * tensor_scale)
    scale = np.where(scale == 0, np.float32(1), scale)
    return np.clip(scale, np.float32(E4M3_TINY), np.float32(E4M3_MAX)).astype(ml_dtypes.float8_e4m3fn)


def nvfp4_dequantize(codes: np.ndarray, block_scale: np.ndarray, tensor_scale: np.ndarray) -> np.ndarray:
    """float32 values [..., in] of the components of an NVFP4 weight. A NaN scale counts as 448."""
    scale = block_scale.astype(np.float32)
    scale = np.where(np.isnan(scale), np.float32(E4M3_MAX), scale)
    values = E2M1_PAIR[codes].reshape(*scale.shape, -1)
    return (values * scale[..., None]).reshape(*codes.shape[:-1], -1) * tensor_scale


def fp8_quantize(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FP8 values [out, in] of one matrix and its 128x128 scale grid, float32 powers of two that multiply (UE8M0)."""
    w = np.asarray(w, np.float32)
    _require_finite(w)
    rows, cols = (-(-size // FP8_BLOCK) for size in w.shape)
    padded = np.zeros((rows * FP8_BLOCK, cols * FP8_BLOCK), np.float32)
    padded[: w.shape[0], : w.shape[1]] = w
    amax = np.abs(padded).reshape(rows, FP8_BLOCK, cols, FP8_BLOCK).max(axis=(1, 3))
    grid = np.exp2(np.ceil(np.log2(np.maximum(amax, np.float32(1e-4)) / np.float32(E4M3_MAX)))).astype(np.float32)
    step = np.repeat(np.repeat(grid, FP8_BLOCK, 0), FP8_BLOCK, 1)[: w.shape[0], : w.shape[1]]
    values = np.clip(w / step, -E4M3_MAX, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)
    return values, grid


def fp8_dequantize(values: np.ndarray, row_scale: np.ndarray) -> np.ndarray:
    """float32 values, rounded to bfloat16, of FP8 values [..., in] with a scale per row and 128 inputs."""
    step = np.repeat(row_scale, FP8_BLOCK, axis=-1)[..., : values.shape[-1]]
    return (values.astype(np.float32) * step).astype(ml_dtypes.bfloat16).astype(np.float32)


def _require_finite(w: np.ndarray) -> None:
    if not np.isfinite(w).all():
        raise ValueError(
            f"{np.count_nonzero(~np.isfinite(w))} of {w.size} values are not finite; nothing was quantized"
        )
