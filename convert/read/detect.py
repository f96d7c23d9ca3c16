"""How one weight is stored in a checkpoint, decided by the names and dtypes beside it and never by its configuration.

kind               tensors of the linear X                                            W =
dense              weight BF16, F16 or F32                                            weight
deepseek-fp8       weight F8_E4M3, weight_scale_inv [out/128, in/128]                 weight * scale_inv
fp8                weight F8_E4M3, weight_scale: 128x128 grid, [out, 1] or one        weight * scale
modelopt-nvfp4     weight U8, weight_scale [out, in/16], weight_scale_2               e2m1 * scale * scale_2
packed-nvfp4       weight_packed U8, weight_scale [out, in/16], weight_global_scale   e2m1 * scale / global_scale
modelopt-nvfp4-awq those of modelopt-nvfp4, pre_quant_scale [in]                     e2m1 * scale * scale_2 * pre
modelopt-nvfp4-svd and svdquant_lora_a [rank, in], svdquant_lora_b [out, rank]       (... + lora_b @ lora_a) * pre

Sizes are rounded up. The block of NVFP4 is in / scale.shape[1], 16 or 32. What is not read is refused by name.
ModelOpt applies pre_quant_scale to the inputs, before both the matrix and the low-rank path beside it.
"""

import dataclasses
import math
from collections.abc import Mapping

from dsv32_jax.errors import CheckpointError

from .header import Tensor
from .stored import FP8_BLOCK, Stored

FLOATS = ("BF16", "F16", "F32")
NVFP4_BLOCKS = (16, 32)

REFUSED = (
    (".weight_quantizer._svdquant_lora_a", "SVDQuant as ModelOpt's first exporters named it"),
    (".input_scale_2", "Quark NVFP4"),
    (".qweight", "AWQ or GPTQ (qweight)"),
    (".weight.packed", "NV_FP4 with the names packed/scales/shape"),
    (".packed", "NV_FP4 with the names packed/scales/shape"),
    (".blocks", "MXFP4 (blocks)"),
    (".weight_shape", "integer pack-quantized"),
)
"""Siblings that mean a format which is not read."""

BESIDE = (".pre_quant_scale", ".svdquant_lora_a", ".svdquant_lora_b")
"""What ModelOpt's AWQ and SVDQuant put beside a weight."""

SUPPORTED = "BF16, F16, F32, FP8 E4M3 with weight_scale_inv or weight_scale, NVFP4 of ModelOpt or compressed-tensors"


class MissingTensors(CheckpointError):
    """Tensors that should be there by the names of others; `names` lists them."""

    def __init__(self, *names: str):
        super().__init__(f"missing: {', '.join(names)}")
        self.names = names


def detect(name: str, tensors: Mapping[str, Tensor]) -> Stored:
    """How the weight `name` ("....weight", or a bias) is stored among `tensors`.

    Raises MissingTensors when it or a scale is absent, CheckpointError when the format is not read or shapes disagree.
    """
    stem = name.removesuffix(".weight")
    if stem == name:
        return _dense(_required(name, tensors))
    for suffix, what in REFUSED:
        if stem + suffix in tensors:
            raise CheckpointError(f"{stem + suffix}: {what} is not yet supported; supported are {SUPPORTED}")
    if (packed := tensors.get(name + "_packed")) is not None:
        if name in tensors:
            raise CheckpointError(f"{stem} has both weight and weight_packed: which one counts is unknown")
        return _packed_nvfp4(packed, name, tensors)
    weight = _required(name, tensors)
    if weight.dtype == "U8":
        return _folded(_modelopt_nvfp4(weight, name, tensors), stem, tensors)
    if weight.dtype == "F8_E4M3":
        return _fp8(weight, name, tensors)
    return _dense(weight)


def _required(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if name not in tensors:
        raise MissingTensors(name)
    return tensors[name]


def _dense(tensor: Tensor) -> Stored:
    if tensor.dtype not in FLOATS:
        raise CheckpointError(f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}; supported are {SUPPORTED}")
    return Stored("dense", "dense", tensor.shape, 1, tensor)


def _fp8(weight: Tensor, name: str, tensors: Mapping[str, Tensor]) -> Stored:
    inverse, plain = tensors.get(name + "_scale_inv"), tensors.get(name + "_scale")
    if inverse is not None and plain is not None:
        raise CheckpointError(f"{name} has both weight_scale_inv and weight_scale: which one counts is unknown")
    scale = inverse if inverse is not None else plain
    if scale is None:
        raise MissingTensors(name + "_scale_inv")
    _matrix(weight)
    if scale.dtype not in FLOATS:
        raise CheckpointError(f"{scale.name} is {scale.dtype}; FP8 scales in {', '.join(FLOATS)} are supported")
    out, width = weight.shape
    grid = (-(-out // FP8_BLOCK), -(-width // FP8_BLOCK))
    allowed = [grid] if inverse is not None else [grid, (out, 1), (1,), (1, 1), ()]
    if scale.shape not in allowed:
        raise CheckpointError(
            f"{scale.name} has shape {list(scale.shape)}; for {name} {list(weight.shape)} it must be "
            + " or ".join(str(list(shape)) for shape in allowed)
        )
    kind = "deepseek-fp8" if inverse is not None else "fp8"
    return Stored(kind, "fp8_block", weight.shape, FP8_BLOCK, weight, scale)


def _modelopt_nvfp4(weight: Tensor, name: str, tensors: Mapping[str, Tensor]) -> Stored:
    scale, scalar = tensors.get(name + "_scale"), tensors.get(name + "_scale_2")
    if scale is not None and scalar is None and scale.dtype in ("U8", "F8_E8M0"):
        raise CheckpointError(f"{scale.name} is {scale.dtype} without weight_scale_2: MXFP4 is not supported")
    if scale is None or scalar is None:
        raise MissingTensors(*(n for n, t in ((name + "_scale", scale), (name + "_scale_2", scalar)) if t is None))
    return _nvfp4("modelopt-nvfp4", weight, scale, scalar, ("F8_E4M3", "U8"))


def _packed_nvfp4(packed: Tensor, name: str, tensors: Mapping[str, Tensor]) -> Stored:
    scale, scalar = tensors.get(name + "_scale"), tensors.get(name + "_global_scale")
    if scale is not None and scalar is None and scale.dtype in ("U8", "F8_E8M0"):
        raise CheckpointError(
            f"{scale.name} is {scale.dtype} without weight_global_scale: NVFP4_E5M3 and MXFP4 are not supported"
        )
    if scale is None or scalar is None:
        raise MissingTensors(*(n for n, t in ((name + "_scale", scale), (name + "_global_scale", scalar)) if t is None))
    if packed.dtype != "U8":
        raise CheckpointError(f"{packed.name} is {packed.dtype}: only E2M1 codes packed into U8 are supported")
    return _nvfp4("packed-nvfp4", packed, scale, scalar, ("F8_E4M3",))


def _nvfp4(kind: str, codes: Tensor, scale: Tensor, scalar: Tensor, scale_dtypes: tuple[str, ...]) -> Stored:
    """Checks that codes, block scales and the scalar belong together."""
    _matrix(codes)
    if scale.dtype not in scale_dtypes:
        raise CheckpointError(f"{scale.name} is {scale.dtype}; NVFP4 block scales are {' or '.join(scale_dtypes)}")
    if len(scale.shape) != 2:
        raise CheckpointError(
            f"{scale.name} has shape {list(scale.shape)}: block scales that are swizzled for a kernel are not supported"
        )
    out, width = codes.shape[0], 2 * codes.shape[1]
    blocks = scale.shape[1]
    if scale.shape[0] != out or not blocks or width % blocks or width // blocks not in NVFP4_BLOCKS:
        allowed = " or ".join(f"[{out}, {width // block}]" for block in NVFP4_BLOCKS if width % block == 0)
        raise CheckpointError(
            f"{scale.name} has shape {list(scale.shape)}; for {codes.name} {list(codes.shape)} it must be "
            f"{allowed or 'absent'} (padded and swizzled scales are not supported)"
        )
    if math.prod(scalar.shape) != 1 or scalar.dtype not in FLOATS:
        raise CheckpointError(f"{scalar.name} is {scalar.dtype} {list(scalar.shape)}, not one floating-point number")
    return Stored(kind, "nvfp4", (out, width), width // blocks, codes, scale, scalar)


def _folded(stored: Stored, stem: str, tensors: Mapping[str, Tensor]) -> Stored:
    """`stored` with what ModelOpt's AWQ or SVDQuant put beside it; then it becomes bfloat16 unless told otherwise."""
    pre, *lora = (tensors.get(stem + suffix) for suffix in BESIDE)
    if pre is None and lora == [None, None]:
        return stored
    method, suffixes = ("nvfp4-awq", BESIDE[:1]) if lora == [None, None] else ("nvfp4-svd", BESIDE)
    if absent := [stem + suffix for suffix in suffixes if stem + suffix not in tensors]:
        raise MissingTensors(*absent)
    found = [tensors[stem + suffix] for suffix in suffixes]
    (out, width), rank = stored.shape, found[1].shape[0] if lora[0] is not None and lora[0].shape else 0
    for tensor, shape in zip(found, ((width,), (rank, width), (out, rank)), strict=False):
        if tensor.shape != shape or tensor.dtype not in FLOATS:
            raise CheckpointError(f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, not floats {list(shape)}")
    return dataclasses.replace(
        stored, kind=f"modelopt-{method}", format=method, pre_quant_scale=pre, lora=tuple(found[1:]), wanted="bf16"
    )


def _matrix(tensor: Tensor) -> None:
    if len(tensor.shape) != 2:
        raise CheckpointError(f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}: quantized weights are matrices")
