"""From the components of a weight's leaves to the tensors it is written as."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dsv32_jax.errors import CheckpointError, listing
from dsv32_jax.quantization.quantize import FP8_BLOCK, NVFP4_BLOCK

from ..read.safetensors import DTYPES
from ..read.weights import dequantize
from ..verify import inverse
from ..verify.converted import Converted, Weight
from . import sharing_scales
from .sharing_scales import Sharing
from .targets import Target

MINUS_ZEROS = 0x88
"""Two elements of NVFP4. A tensor of nothing but zero bytes looks like a hole in a file that was not downloaded."""


class Encoder:
    """Makes the tensors of `targets`, and remembers what could not be written exactly."""

    def __init__(
        self,
        converted: Converted,
        every: Mapping[str, Weight],
        targets: Mapping[str, Target],
        sharing: Sharing,
    ):
        self._converted, self._weights, self._targets, self._shared = converted, every, targets, sharing.shared
        self.inexact: list[str] = []
        self.voids: list[str] = []

    def tensors(self, weight: Weight, parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The tensors of one weight, by name, from the components of its leaves."""
        target = self._targets[weight.name]
        if target.kind == "dense" and target.as_stored is None:
            return self._dense(weight, parts, target)
        format = weight.formats[0]
        joined = inverse.join_leaves(weight.leaves, parts, format, _block(weight, format))
        if target.as_stored is not None:
            return inverse.restore_tensors(joined, target.as_stored, weight.sources)
        return self._nvfp4(weight, joined, target) if format == "nvfp4" else self._fp8(joined, target)

    def notes(self) -> Iterator[str]:
        """What is not exactly as it is stored."""
        if self.inexact:
            yield (
                f"{len(self.inexact)} tensor scales have no exact inverse; read back they differ by at most one part "
                f"in 2^23 ({listing(self.inexact, 4)})"
            )
        if self.voids:
            yield f"{len(self.voids)} matrices of zeros have the tensor scale 0, written as -0 with the divisor 1"

    def _dense(self, weight: Weight, parts: Sequence[dict[str, np.ndarray]], target: Target) -> dict[str, np.ndarray]:
        dtype = DTYPES[target.tensors[0].dtype]
        plain = [{"values": dequantize(part).astype(dtype, copy=False)} for part in parts]
        return {weight.name: inverse.join_leaves(weight.leaves, plain, "dense", 1)["values"]}

    def _fp8(self, joined: dict[str, np.ndarray], target: Target) -> dict[str, np.ndarray]:
        values, scale = target.tensors
        grid = inverse.collapse_scales(joined["block_scale"], scale.shape, scale.name)
        return {values.name: joined["values"], scale.name: grid}

    def _nvfp4(self, weight: Weight, joined: dict[str, np.ndarray], target: Target) -> dict[str, np.ndarray]:
        joined = sharing_scales.apply(self._shared, weight.name, joined)
        values, scale, scalar = target.tensors
        codes, block_scale = joined["codes"], joined["block_scale"]
        block_scale = np.repeat(block_scale, scale.shape[1] // block_scale.shape[1], axis=1)
        owner = self._weights[self._shared[weight.name].partner] if weight.name in self._shared else weight
        factor = self._converted.component(owner, "tensor_scale").reshape(1)
        if target.kind == "packed-nvfp4":
            if factor[0] == 0:
                self.voids.append(weight.name)
                codes, block_scale = np.full_like(codes, MINUS_ZEROS), np.ones_like(block_scale)
            factor = self._divisor(owner, factor[0])
        return {values.name: codes, scale.name: block_scale, scalar.name: factor.reshape(scalar.shape)}

    def _divisor(self, owner: Weight, factor: np.float32) -> np.ndarray:
        """The float32 [1] whose inverse is `factor`: the source's own, or the nearest there is."""
        if not factor:
            return np.ones(1, np.float32)
        recorded = next((source for source in owner.sources if source.bits), None)
        if recorded is not None:
            return np.frombuffer(bytes.fromhex(recorded.bits), DTYPES[recorded.dtype]).astype(np.float32)
        nearest = np.float32(1) / factor
        if not np.isfinite(nearest):
            raise CheckpointError(f"the tensor scale {factor:g} of {owner.name} has no inverse that can be written")
        around = [nearest, np.nextafter(nearest, np.float32(0)), np.nextafter(nearest, np.float32(np.inf))]
        exact = next((one for one in around if np.float32(1) / one == factor), None)
        if exact is None:
            self.inexact.append(owner.name)
        return np.array([nearest if exact is None else exact], np.float32)


def _block(weight: Weight, format: str) -> int:
    """The inputs per scale of a whole row of `weight`."""
    if weight.sources and not weight.change:
        return inverse.describe_storage(weight.name, weight.sources).block
    return {"nvfp4": NVFP4_BLOCK, "fp8_block": FP8_BLOCK}.get(format, 1)
