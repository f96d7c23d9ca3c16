"""How each weight of a converted checkpoint is written in the layout of other software, and the tensors it becomes.

A weight that the source stored in the same layout, with every bit kept, is written as it was: names, dtypes and shapes.
Other weights get the layout's usual ones, and what the layout has no place for becomes bfloat16.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dsv32_jax.errors import CheckpointError, listing, pluralize
from dsv32_jax.quantization.quantize import FP8_BLOCK, NVFP4_BLOCK

from ..read.converted import Components, Converted, Weight
from ..read.safetensors import DTYPES, Tensor, make_tensor
from ..read.weights import StoredWeight
from ..transform.cut import name_format
from ..transform.requantize import dequantize
from ..verify import inverse
from .shared_scales import share_scales

DTYPE_NAMES = {dtype.name: name for name, dtype in DTYPES.items()}
LAYOUTS = {
    ("modelopt", "nvfp4"): ("modelopt-nvfp4", ("", "_scale", "_scale_2")),
    ("modelopt", "fp8_block"): ("deepseek-fp8", ("", "_scale_inv")),
    ("compressed-tensors", "nvfp4"): ("packed-nvfp4", ("_packed", "_scale", "_global_scale")),
    ("compressed-tensors", "fp8_block"): ("fp8", ("", "_scale")),
}
"""Kind of storage (as in `detect`) and suffixes of a weight's tensors, by family and format."""

MINUS_ZEROS = 0x88
"""Two elements of NVFP4. A tensor of zero bytes would look like a hole in a file that was not downloaded."""


class Target(NamedTuple):
    """How one weight is written: kind of storage, inputs per scale, and its tensors: values, scales, scalar.

    `as_stored`: the source's storage, which is restored bit by bit; `why`: why the weight becomes bfloat16. Of NVFP4
    that is not restored: `scalar` is the tensor scale, or its inverse, and `scale_bytes` the new byte of every block
    scale byte, if another weight's tensor scale is used.
    """

    kind: str
    block: int
    tensors: tuple[Tensor, ...]
    as_stored: StoredWeight | None = None
    why: str = ""
    scalar: np.ndarray | None = None
    scale_bytes: np.ndarray | None = None

    def with_own_scales(self, block: int) -> "Target":
        """This NVFP4 target, not restored from the source, with scales for `block` inputs."""
        values, scale, scalar = self.tensors
        shape = (values.shape[0], 2 * values.shape[1] // block)
        tensors = (values, make_tensor(scale.name, "F8_E4M3", shape), make_tensor(scalar.name, "F32", scalar.shape))
        return self._replace(block=block, tensors=tensors, as_stored=None)


def choose_targets(converted: Converted, family: str, share: bool) -> tuple[dict[str, Target], list[str]]:
    """The target of every weight, by name, and notes on what is not written exactly as it is stored."""
    weights = {w.name: w for group in converted.groups for w in group.weights if not w.is_left_out}
    nvfp4 = [w for w in weights.values() if family != "bf16" and set(w.formats) == {"nvfp4"}]
    targets = {name: _choose(converted, weight, family, bool(nvfp4)) for name, weight in weights.items()}
    notes = [
        f"not converted, so not exported: {pluralize(count, 'tensor')} of the source ({reason})"
        for reason, count in converted.manifest.report["ignored"].items()
    ]
    shared, more = share_scales(converted, nvfp4, share)
    for name, (_, scale_bytes) in shared.items():
        target = targets[name]
        targets[name] = target.with_own_scales(target.block)._replace(scale_bytes=scale_bytes)
    notes += more
    wide = [w.name for w in nvfp4 if targets[w.name].block > NVFP4_BLOCK]
    if family == "modelopt" and 0 < len(wide) < len(nvfp4):
        targets |= {name: targets[name].with_own_scales(NVFP4_BLOCK) for name in wide}
        notes.append(f"group_size is 16: scales for 32 inputs are written twice in {pluralize(len(wide), 'weight')}")
    owners = {w.name: shared[w.name].partner if w.name in shared else w for w in nvfp4}
    notes += _set_scalars(converted, targets, owners)
    return targets, notes


def _choose(converted: Converted, weight: Weight, family: str, beside_nvfp4: bool) -> Target:
    (out, *inputs), formats = weight.leaves[0].source_shape, set(weight.formats)
    stored = weight.storage()
    if formats == {"dense"}:
        dtype = DTYPE_NAMES[converted.dtype(weight)] if stored is None else stored.values.dtype
        return Target("dense", 1, (make_tensor(weight.name, dtype, (out, *inputs)),), stored)
    kind, suffixes = LAYOUTS.get((family, weight.formats[0]), ("", ()))
    if why := _find_obstacle(weight, family, stored, kind, beside_nvfp4):
        tensor = make_tensor(weight.name, "BF16", (out, *inputs))
        return Target("dense", 1, (tensor,), why=f"dequantized to bf16: {why}")
    if stored is not None and stored.kind == kind:
        return Target(kind, stored.block, stored.tensors, stored)
    names = [weight.name + suffix for suffix in suffixes]
    (width,), block = inputs, weight.block
    dtypes, shapes = ("F8_E4M3", "F32"), ((out, width), (-(-out // FP8_BLOCK), -(-width // FP8_BLOCK)))
    if formats == {"nvfp4"}:
        dtypes = ("U8", "F8_E4M3", "F32")
        shapes = ((out, width // 2), (out, width // block), () if family == "modelopt" else (1,))
    return Target(kind, block, tuple(map(make_tensor, names, dtypes, shapes)))


def _find_obstacle(
    weight: Weight, family: str, stored: StoredWeight | None, kind: str, beside_nvfp4: bool
) -> str | None:
    formats = " and ".join(sorted({name_format(format, "dense") for format in weight.formats}))
    if family == "bf16":
        return f"{formats}, as asked"
    if len(set(weight.formats)) > 1:
        return f"its parts are stored as {formats}"
    if formats == "nvfp4":
        return None
    if family == "modelopt" and beside_nvfp4:
        return "FP8 blocks beside NVFP4 are not read under ModelOpt's names"
    if stored is not None and stored.scale is not None and stored.kind != kind:
        grid = tuple(-(-size // FP8_BLOCK) for size in stored.shape)
        if stored.scale.shape not in (grid, (), (1,), (1, 1)):
            return "FP8 with a scale for each row has no place among 128x128 blocks"
    return None


def _set_scalars(converted: Converted, targets: dict[str, Target], owners: Mapping[str, Weight]) -> Iterator[str]:
    """Set the tensor scales of NVFP4 targets that are not restored, each its owner's; notes on those that changed."""
    inexact, voids = [], []
    for name, owner in owners.items():
        target = targets[name]
        if target.as_stored is not None:
            continue
        scalar = converted.component(owner, "tensor_scale").reshape(1)
        if target.kind == "packed-nvfp4":
            factor, scalar = scalar[0], _invert(scalar[0], owner)
            if not factor:
                voids.append(name)
            elif np.float32(1) / scalar != factor:
                inexact.append(name)
        targets[name] = target._replace(scalar=scalar)
    if inexact:
        count, names = pluralize(len(inexact), "tensor scale"), listing(inexact, 4)
        yield f"no exact inverse for {count}; read back they differ by at most one part in 2^23 ({names})"
    if voids:
        count = pluralize(len(voids), "matrix", "matrices")
        yield f"tensor scale 0 written as elements of -0 with the divisor 1: {count} of zeros"


def _invert(factor: np.float32, owner: Weight) -> np.ndarray:
    """The float32 [1] whose inverse is `factor`: the source's own, or the nearest; 1 for a matrix of zeros."""
    if not factor:
        return np.ones(1, np.float32)
    recorded = next((source for source in owner.sources if source.bits), None)
    if recorded is not None:
        return np.frombuffer(bytes.fromhex(recorded.bits), DTYPES[recorded.dtype]).astype(np.float32)
    nearest = np.float32(1) / factor
    if not np.isfinite(nearest):
        raise CheckpointError(f"the tensor scale {factor:g} of {owner.name} has no inverse that can be written")
    candidates = [nearest, np.nextafter(nearest, np.float32(0)), np.nextafter(nearest, np.float32(np.inf))]
    return np.array([next((one for one in candidates if np.float32(1) / one == factor), nearest)], np.float32)


def encode(target: Target, weight: Weight, parts: Sequence[Components]) -> dict[str, np.ndarray]:
    """The tensors of one weight, by name, from the components of its parameters."""
    if target.kind == "dense" and target.as_stored is None:
        dtype = DTYPES[target.tensors[0].dtype]
        values = [{"values": dequantize(part).astype(dtype, copy=False)} for part in parts]
        return {weight.name: inverse.join_leaves(weight.leaves, values, "dense", 1)["values"]}
    joined = inverse.join_leaves(weight.leaves, parts, weight.formats[0], weight.block)
    if target.as_stored is not None:
        return inverse.restore_tensors(joined, target.as_stored, weight.sources)
    values, scale, *scalar = target.tensors
    if target.scalar is None:
        grid = inverse.collapse_scales(joined["block_scale"], scale.shape, scale.name)
        return {values.name: joined["values"], scale.name: grid}
    codes, block_scale = joined["codes"], joined["block_scale"]
    if target.scale_bytes is not None:
        block_scale = target.scale_bytes[block_scale.view(np.uint8)].view(block_scale.dtype)
    block_scale = np.repeat(block_scale, scale.shape[1] // block_scale.shape[1], axis=1)
    if target.kind == "packed-nvfp4" and not joined["tensor_scale"][0]:
        codes, block_scale = np.full_like(codes, MINUS_ZEROS), np.ones_like(block_scale)
    return {values.name: codes, scale.name: block_scale, scalar[0].name: target.scalar.reshape(scalar[0].shape)}
