"""One weight of a checkpoint as it is stored, and the formats it can be kept in."""

import dataclasses

from .header import Tensor

FP8_BLOCK = 128

FOLDED = {
    "nvfp4-awq": "the scale of its inputs (pre_quant_scale, AWQ) has no place in NVFP4",
    "nvfp4-svd": "its low-rank part (svdquant_lora, SVDQuant) has no place in NVFP4",
}
"""Formats that are read but not kept, and why: what stands beside the matrix becomes part of it."""

BECOMES = {"nvfp4": ("nvfp4", 16), "fp8": ("fp8_block", FP8_BLOCK), "bf16": ("dense", 1)}
"""Formats that a weight can be converted to: the manifest's name, inputs per scale."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """One weight of a checkpoint. `format` is the manifest's (or one of FOLDED), `shape` the logical one, `block` the
    inputs per scale.

    `values` holds the elements (or packed codes), `scale` their block scales, `tensor_scale` the scalar of NVFP4,
    `pre_quant_scale` and `lora` (a, b) what ModelOpt puts beside it. `wanted`: one of BECOMES, None to stay as it is.
    """

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

    def is_in(self, wanted: str) -> bool:
        """Whether the weight is in the format `wanted`, one of BECOMES, already."""
        return BECOMES[wanted][0] == self.format and (wanted != "bf16" or self.values.dtype == "BF16")

    @property
    def becomes(self) -> tuple[str, int]:
        """The manifest's format in which the weight is kept, and its inputs per scale."""
        return (self.format, self.block) if self.wanted is None else BECOMES[self.wanted]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor the weight is made of."""
        found = (self.values, self.scale, self.tensor_scale, self.pre_quant_scale, *self.lora)
        return tuple(tensor for tensor in found if tensor is not None)
