"""One weight of the source as the arrays of its format: [out, in'] each, scalars as [1, 1], nothing cut yet."""

from collections.abc import Callable

import ml_dtypes
import numpy as np

from dsv32_jax.errors import CheckpointError
from dsv32_jax.quantization.quantize import fp8_dequantize, nvfp4_dequantize

from .header import Tensor
from .stored import FP8_BLOCK, Stored

Read = Callable[[Tensor], np.ndarray]


def load(stored: Stored, read: Read) -> dict[str, np.ndarray]:
    """The components (manifest.COMPONENTS) of the weight. Bytes are kept; only FP8 scales are expanded to rows."""
    values = read(stored.values)
    if stored.format == "dense":
        return {"values": values}
    assert stored.scale is not None
    scale = read(stored.scale)
    if stored.format == "fp8_block":
        return {"values": values, "block_scale": _row_scale(scale, stored.shape)}
    block_scale = scale.view(ml_dtypes.float8_e4m3fn)
    return {"codes": values, "block_scale": block_scale, "tensor_scale": tensor_scale(stored, read).reshape(1, 1)}


def values(stored: Stored, parts: dict[str, np.ndarray], read: Read) -> np.ndarray:
    """The matrix [out, in] whose components `load` returned, with what stands beside it folded in."""
    matrix = exact(parts)
    if stored.lora:
        a, b = (read(tensor).astype(np.float32) for tensor in stored.lora)
        matrix += b @ a
    if stored.pre_quant_scale is not None:
        matrix *= read(stored.pre_quant_scale).astype(np.float32)
    return matrix


def exact(parts: dict[str, np.ndarray]) -> np.ndarray:
    """The values of components: float32 of NVFP4, bfloat16 of FP8 (which holds them by definition), dense as it is."""
    if "codes" in parts:
        return nvfp4_dequantize(parts["codes"], parts["block_scale"], parts["tensor_scale"])
    if "block_scale" in parts:
        return fp8_dequantize(parts["values"], parts["block_scale"], ml_dtypes.bfloat16)
    return parts["values"]


def tensor_scale(stored: Stored, read: Read) -> np.ndarray:
    """The float32 [1] that multiplies an NVFP4 matrix (compressed-tensors stores its inverse).

    Raises CheckpointError when it cannot be one. Zero is legal only where every block scale is zero or NaN: ModelOpt
    writes that for a matrix of zeros.
    """
    assert stored.tensor_scale is not None and stored.scale is not None
    name = stored.tensor_scale.name
    value = read(stored.tensor_scale).astype(np.float32).reshape(1)
    divisor = stored.kind == "packed-nvfp4"
    if divisor and not (np.isfinite(value) and value >= 1):
        raise CheckpointError(
            f"{name} is {value[0]:g}, but as a divisor it must be finite and at least 1: "
            "it looks like ModelOpt's weight_scale_2, which multiplies, under compressed-tensors' name"
        )
    if not divisor and not (np.isfinite(value) and 0 <= value <= 1):
        raise CheckpointError(
            f"{name} is {value[0]:g}, but as a factor it must be between 0 and 1: "
            "it looks like compressed-tensors' weight_global_scale, which divides, under ModelOpt's name"
        )
    if not divisor and value == 0 and not _is_void(read(stored.scale)):
        raise CheckpointError(f"{name} is 0 although {stored.scale.name} is neither zero nor NaN throughout")
    return np.float32(1) / value if divisor else value


def _is_void(scale: np.ndarray) -> bool:
    magnitude = scale.view(np.uint8) & 0x7F
    return bool(((magnitude == 0) | (magnitude == 0x7F)).all())


def _row_scale(scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """float32 [out, ceil(in / 128)] from a 128x128 grid, one scale a row, or one scale for all."""
    out, width = shape
    rows, blocks = -(-out // FP8_BLOCK), -(-width // FP8_BLOCK)
    scale = scale.astype(np.float32)
    if scale.shape == (rows, blocks):
        return np.repeat(scale, FP8_BLOCK, axis=0)[:out]
    return np.ascontiguousarray(np.broadcast_to(scale.reshape(-1, 1), (out, blocks)))
