"""One weight of a source checkpoint: how it is stored, its components, and its values.

The names and dtypes of the tensors beside a weight decide how it is stored, never the checkpoint's configuration:

kind               tensors of the linear X                                            W =
dense              weight BF16, F16 or F32                                            weight
deepseek-fp8       weight F8_E4M3, weight_scale_inv [out/128, in/128]                 weight * scale_inv
fp8                weight F8_E4M3, weight_scale                                       weight * scale
modelopt-nvfp4     weight U8, weight_scale [out, in/16], weight_scale_2               e2m1 * scale * scale_2
packed-nvfp4       weight_packed U8, weight_scale [out, in/16], weight_global_scale   e2m1 * scale / global_scale
modelopt-nvfp4-awq those of modelopt-nvfp4, pre_quant_scale [in]                      e2m1 * scale * scale_2 * pre
modelopt-nvfp4-svd and svdquant_lora_a [rank, in], svdquant_lora_b [out, rank]        (... + lora_b @ lora_a) * pre

Sizes are rounded up. A scale of FP8 is a 128x128 grid (also [rows, 1, columns, 1]), one a row ([out] or [out, 1]), or
one for all. The block of NVFP4 is in / scale.shape[1], 16 or 32. ModelOpt applies pre_quant_scale to the inputs, before
both the matrix and the low-rank path beside it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

from dsv32_jax.errors import CheckpointError
from dsv32_jax.quantization.quantize import FP8_BLOCK, NVFP4_BLOCK

from .safetensors import Tensor

FLOATS = ("BF16", "F16", "F32")
BLOCK_SIZES = (NVFP4_BLOCK, 2 * NVFP4_BLOCK)

UNSUPPORTED = (
    (".weight_quantizer._svdquant_lora_a", "SVDQuant as ModelOpt's first exporters named it"),
    (".input_scale_2", "Quark NVFP4"),
    (".qweight", "AWQ or GPTQ (qweight)"),
    (".weight.packed", "NV_FP4 with the names packed/scales/shape"),
    (".packed", "NV_FP4 with the names packed/scales/shape"),
    (".blocks", "MXFP4 (blocks)"),
    (".weight_shape", "integer pack-quantized"),
)
"""Tensors beside a weight that mean an unsupported format."""

SUPPORTED = "BF16, F16, F32, FP8 E4M3 with weight_scale_inv or weight_scale, NVFP4 of ModelOpt or compressed-tensors"

SCALES = ("_scale", "_scale_inv", "_scale_2", "_global_scale")
"""Suffixes of a weight's name for its scales."""

FACTORS = (".pre_quant_scale", ".svdquant_lora_a", ".svdquant_lora_b")
"""Suffixes of a linear's name for the tensors of ModelOpt's AWQ and SVDQuant."""

TARGETS = {"nvfp4": ("nvfp4", NVFP4_BLOCK), "fp8": ("fp8_block", FP8_BLOCK), "bf16": ("dense", 1)}
"""Formats to convert to: the manifest's name, inputs per scale."""

Read = Callable[[Tensor], np.ndarray]


class MissingTensorsError(CheckpointError):
    """Tensors, by their `names`, that must accompany others are missing."""

    def __init__(self, *names: str):
        super().__init__(f"missing: {', '.join(names)}")
        self.names = names


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """One weight of a checkpoint: `format` as the manifest names it (or "nvfp4-awq", "nvfp4-svd"), logical `shape`,
    `block` of inputs per scale, and its tensors: `values` are the elements or packed codes, `pre_quant_scale` and
    `lora` (a, b) the factors of AWQ and SVDQuant. `wanted`: the format to convert to, one of TARGETS, or None."""

    kind: str
    format: str
    shape: tuple[int, ...]
    block: int
    values: Tensor
    scale: Tensor | None = None
    tensor_scale: Tensor | None = None
    pre_quant_scale: Tensor | None = None
    lora: tuple[Tensor, ...] = ()
    wanted: str | None = None

    @property
    def name(self) -> str:
        """The name of the weight, whatever its tensors are called."""
        return self.values.name.removesuffix("_packed")

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor the weight is made of."""
        found = (self.values, self.scale, self.tensor_scale, self.pre_quant_scale, *self.lora)
        return tuple(tensor for tensor in found if tensor is not None)

    @property
    def becomes(self) -> tuple[str, int]:
        """The manifest's format of the converted weight, and its inputs per scale."""
        return (self.format, self.block) if self.wanted is None else TARGETS[self.wanted]

    def is_in(self, target: str) -> bool:
        """Return whether the weight already is in the format `target`, one of TARGETS."""
        return TARGETS[target][0] == self.format and (target != "bf16" or self.values.dtype == "BF16")


def split_weight(name: str) -> tuple[str, str]:
    """Return the name of the weight that a tensor belongs to by its name, and the suffix of the latter."""
    stem, mark, suffix = name.rpartition(".weight")
    return (stem + mark, suffix) if mark else (name, "")


def detect(name: str, tensors: Mapping[str, Tensor]) -> StoredWeight:
    """Find out how the weight `name` ("....weight", or a bias) is stored among `tensors`. Raises MissingTensorsError if
    it or a scale is absent, CheckpointError if the format is unsupported or shapes disagree."""
    stem = name.removesuffix(".weight")
    for suffix, format in UNSUPPORTED:
        if stem + suffix in tensors:
            raise CheckpointError(f"{stem + suffix}: {format} is not supported; supported are {SUPPORTED}")
    packed = tensors.get(name + "_packed")
    if packed is not None and name in tensors:
        raise CheckpointError(f"{stem} has both weight and weight_packed: which one counts is unknown")
    if packed is not None:
        return _detect_nvfp4("packed-nvfp4", packed, name, tensors)
    (weight,) = _find(tensors, name)
    if weight.dtype == "U8" and stem != name:
        return _add_factors(_detect_nvfp4("modelopt-nvfp4", weight, name, tensors), stem, tensors)
    if weight.dtype == "F8_E4M3" and stem != name:
        return _detect_fp8(weight, name, tensors)
    if weight.dtype not in FLOATS:
        raise CheckpointError(f"{weight}; supported are {SUPPORTED}")
    return StoredWeight("dense", "dense", weight.shape, 1, weight)


def _find(tensors: Mapping[str, Tensor], *names: str) -> list[Tensor]:
    if missing := [name for name in names if name not in tensors]:
        raise MissingTensorsError(*missing)
    return [tensors[name] for name in names]


def _require_quantized(weight: Tensor, scale: Tensor, dtypes: tuple[str, ...]) -> None:
    if len(weight.shape) != 2:
        raise CheckpointError(f"{weight}: quantized weights are matrices")
    if scale.dtype not in dtypes:
        raise CheckpointError(f"{scale.name} is {scale.dtype}; scales of this format are {' or '.join(dtypes)}")


def _require_shape(scale: Tensor, weight: Tensor, allowed: list[tuple[int, ...]]) -> None:
    if scale.shape not in allowed:
        shapes = " or ".join(str(list(shape)) for shape in allowed) or "absent"
        hint = "scales that are padded or swizzled for a kernel are not supported"
        raise CheckpointError(f"{scale}; for {weight.name} {list(weight.shape)} it must be {shapes} ({hint})")


def _detect_fp8(weight: Tensor, name: str, tensors: Mapping[str, Tensor]) -> StoredWeight:
    kind, suffix = ("fp8", "_scale") if name + "_scale" in tensors else ("deepseek-fp8", "_scale_inv")
    if kind == "fp8" and name + "_scale_inv" in tensors:
        raise CheckpointError(f"{name} has both weight_scale_inv and weight_scale: which one counts is unknown")
    (scale,) = _find(tensors, name + suffix)
    _require_quantized(weight, scale, (*FLOATS, "F8_E8M0"))
    out, width = weight.shape
    rows, columns = -(-out // FP8_BLOCK), -(-width // FP8_BLOCK)
    grids = [(rows, columns), (rows, 1, columns, 1)]
    _require_shape(scale, weight, [*grids, (out, 1), (out,), (1,), (1, 1), ()])
    return StoredWeight(kind, "fp8_block", weight.shape, FP8_BLOCK, weight, scale)


def _detect_nvfp4(kind: str, codes: Tensor, name: str, tensors: Mapping[str, Tensor]) -> StoredWeight:
    is_packed = kind == "packed-nvfp4"
    suffix, others = ("_global_scale", "NVFP4_E5M3 and MXFP4 are") if is_packed else ("_scale_2", "MXFP4 is")
    found = tensors.get(name + "_scale")
    if found is not None and name + suffix not in tensors and found.dtype in ("U8", "F8_E8M0"):
        raise CheckpointError(f"{found.name} is {found.dtype} without weight{suffix}: {others} not supported")
    scale, scalar = _find(tensors, name + "_scale", name + suffix)
    if codes.dtype != "U8":
        raise CheckpointError(f"{codes.name} is {codes.dtype}: only E2M1 codes packed into U8 are supported")
    _require_quantized(codes, scale, ("F8_E4M3",) if is_packed else ("F8_E4M3", "U8"))
    out, width = codes.shape[0], 2 * codes.shape[1]
    _require_shape(scale, codes, [(out, width // block) for block in BLOCK_SIZES if width and width % block == 0])
    if math.prod(scalar.shape) != 1 or scalar.dtype not in FLOATS:
        raise CheckpointError(f"{scalar}, not one floating-point number")
    return StoredWeight(kind, "nvfp4", (out, width), width // scale.shape[1], codes, scale, scalar)


def _add_factors(stored: StoredWeight, stem: str, tensors: Mapping[str, Tensor]) -> StoredWeight:
    """Add the factors of AWQ or SVDQuant, if any; such a weight becomes bfloat16 unless the policy says otherwise."""
    present = [stem + suffix in tensors for suffix in FACTORS]
    if not any(present):
        return stored
    method, suffixes = ("nvfp4-svd", FACTORS) if any(present[1:]) else ("nvfp4-awq", FACTORS[:1])
    pre, *lora = _find(tensors, *(stem + suffix for suffix in suffixes))
    (out, width), rank = stored.shape, lora[0].shape[0] if lora and lora[0].shape else 0
    for tensor, shape in zip((pre, *lora), ((width,), (rank, width), (out, rank)), strict=False):
        if tensor.shape != shape or tensor.dtype not in FLOATS:
            raise CheckpointError(f"{tensor}, not floats {list(shape)}")
    return dataclasses.replace(
        stored, kind=f"modelopt-{method}", format=method, pre_quant_scale=pre, lora=tuple(lora), wanted="bf16"
    )


def read_components(stored: StoredWeight, read: Read) -> dict[str, np.ndarray]:
    """Read the components of a weight (manifest.COMPONENTS), [out, in'] each: tensor_scale [1, 1], FP8 scales one per
    row."""
    values = read(stored.values)
    if stored.format == "dense":
        return {"values": values}
    assert stored.scale is not None
    scale = read(stored.scale)
    if stored.format == "fp8_block":
        return {"values": values, "block_scale": _expand_to_rows(scale, stored.shape)}
    block_scale = scale.view(ml_dtypes.float8_e4m3fn)
    return {"codes": values, "block_scale": block_scale, "tensor_scale": read_tensor_scale(stored, read).reshape(1, 1)}


def read_tensor_scale(stored: StoredWeight, read: Read) -> np.ndarray:
    """Return the float32 [1] that multiplies an NVFP4 matrix; compressed-tensors stores its inverse.

    Raises CheckpointError if it is out of range. Zero is legal only if every block scale is zero or NaN: ModelOpt
    writes that for a matrix of zeros.
    """
    assert stored.tensor_scale is not None and stored.scale is not None
    name = stored.tensor_scale.name
    value = read(stored.tensor_scale).astype(np.float32).reshape(1)
    if stored.kind == "packed-nvfp4":
        if not (np.isfinite(value) and value >= 1):
            raise CheckpointError(
                f"{name} is {value[0]:g}, but as a divisor it must be finite and at least 1: "
                "it looks like ModelOpt's weight_scale_2, which multiplies, under compressed-tensors' name"
            )
        return np.float32(1) / value
    if not (np.isfinite(value) and 0 <= value <= 1):
        raise CheckpointError(
            f"{name} is {value[0]:g}, but as a factor it must be between 0 and 1: "
            "it looks like compressed-tensors' weight_global_scale, which divides, under ModelOpt's name"
        )
    if value == 0:
        magnitude = read(stored.scale).view(np.uint8) & 0x7F
        if not ((magnitude == 0) | (magnitude == 0x7F)).all():
            raise CheckpointError(f"{name} is 0, but {stored.scale.name} has scales that are neither zero nor NaN")
    return value


def _expand_to_rows(scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return float32 [out, ceil(in / 128)] from a 128x128 grid, one scale a row, or one scale for all."""
    out, rows, blocks = shape[0], *(-(-size // FP8_BLOCK) for size in shape)
    scale = scale.astype(np.float32)
    if scale.shape in ((rows, blocks), (rows, 1, blocks, 1)):
        scale = scale.reshape(rows, blocks)
        return np.repeat(scale, FP8_BLOCK, axis=0)[:out]
    return np.ascontiguousarray(np.broadcast_to(scale.reshape(-1, 1), (out, blocks)))
