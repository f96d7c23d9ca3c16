"""What each weight of a converted checkpoint is written as in another layout, decided from the manifest alone.

A weight that is stored in the family that is written, with every bit kept, is written as it was: names, dtypes and
shapes of the source. Otherwise it gets that family's usual ones. What the family has no place for becomes bfloat16.
"""

from typing import NamedTuple

from dsv32_jax.quantization.quantize import FP8_BLOCK, NVFP4_BLOCK

from ..read.weights import StoredWeight
from ..verify import inverse
from ..verify.converted import Weight

FAMILIES = ("modelopt", "compressed-tensors", "bf16")
DTYPE_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


class Written(NamedTuple):
    """One tensor to be written; `dtype` as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Target(NamedTuple):
    """How one weight is written: its kind (as in `detect`), inputs per scale, its tensors in the order values, scales,
    scalar. `as_stored`: the source's storage where it is restored bit by bit. `why`: why it becomes bfloat16."""

    kind: str
    block: int
    tensors: tuple[Written, ...]
    as_stored: StoredWeight | None = None
    why: str = ""

    @property
    def strategy(self) -> str:
        """What one FP8 scale is for, in the words of compressed-tensors: block, channel or tensor."""
        rows, shape = self.tensors[0].shape[0], self.tensors[1].shape
        if shape in ((), (1,)) or (shape == (1, 1) and max(self.tensors[0].shape) > FP8_BLOCK):
            return "tensor"
        return "channel" if shape == (rows, 1) and rows > 1 else "block"

    def renewed(self, block: int) -> "Target":
        """This NVFP4 target with scales of its own instead of the source's: `block` inputs each, a float32 scalar."""
        values, scale, scalar = self.tensors
        shape = (values.shape[0], 2 * values.shape[1] // block)
        tensors = (values, Written(scale.name, "F8_E4M3", shape), Written(scalar.name, "F32", scalar.shape))
        return self._replace(block=block, tensors=tensors, as_stored=None)


def choose(weight: Weight, family: str, formats: tuple[str, ...], dtype: str, beside_nvfp4: bool) -> Target:
    """The Target of `weight` in `family`: `formats` are its leaves' in the manifest, `dtype` of dense ones NumPy's;
    `beside_nvfp4`: whether there are weights in NVFP4.
    """
    stored = None
    if weight.sources and not weight.change:
        stored = inverse.describe_storage(weight.name, weight.sources)
    if set(formats) == {"dense"}:
        return _dense(weight, DTYPE_NAMES[dtype] if stored is None else stored.values.dtype, stored)
    if family == "bf16":
        return _dense(weight, "BF16", None, f"{_names(formats)} was asked to become bf16")
    if len(set(formats)) > 1:
        return _dense(weight, "BF16", None, f"its parts are stored as {_names(formats)}")
    if formats[0] == "nvfp4":
        return _nvfp4(weight, family, stored)
    if family == "modelopt" and beside_nvfp4:
        return _dense(weight, "BF16", None, "FP8 blocks beside NVFP4 are not read under ModelOpt's names")
    return _fp8(weight, family, stored)


def _dense(weight: Weight, dtype: str, stored: StoredWeight | None, why: str = "") -> Target:
    return Target("dense", 1, (Written(weight.name, dtype, weight.leaves[0].source_shape),), stored, why)


def _nvfp4(weight: Weight, family: str, stored: StoredWeight | None) -> Target:
    kind = "modelopt-nvfp4" if family == "modelopt" else "packed-nvfp4"
    block = NVFP4_BLOCK if stored is None else stored.block
    if stored is not None and stored.kind == kind:
        return _as_stored(stored)
    out, width = weight.leaves[0].source_shape
    values, scalar = ("", "_scale_2") if family == "modelopt" else ("_packed", "_global_scale")
    tensors = (
        Written(weight.name + values, "U8", (out, width // 2)),
        Written(weight.name + "_scale", "F8_E4M3", (out, width // block)),
        Written(weight.name + scalar, "F32", () if family == "modelopt" else (1,)),
    )
    return Target(kind, block, tensors)


def _fp8(weight: Weight, family: str, stored: StoredWeight | None) -> Target:
    kind = "deepseek-fp8" if family == "modelopt" else "fp8"
    if stored is not None and stored.kind == kind:
        return _as_stored(stored)
    out, width = weight.leaves[0].source_shape
    grid = (-(-out // FP8_BLOCK), -(-width // FP8_BLOCK))
    if stored is not None and stored.scale is not None and stored.scale.shape not in (grid, (), (1,), (1, 1)):
        return _dense(weight, "BF16", None, "FP8 with a scale for each row has no place among 128x128 blocks")
    suffix = "_scale_inv" if family == "modelopt" else "_scale"
    tensors = (
        Written(weight.name, "F8_E4M3", (out, width)),
        Written(weight.name + suffix, "F32", grid),
    )
    return Target(kind, FP8_BLOCK, tensors)


def _as_stored(stored: StoredWeight) -> Target:
    tensors = tuple(Written(tensor.name, tensor.dtype, tensor.shape) for tensor in stored.tensors)
    return Target(stored.kind, stored.block, tensors, stored)


def _names(formats: tuple[str, ...]) -> str:
    return " and ".join(sorted(set(formats)))
