"""The inverse of a conversion: from the components of parameters to the source's tensors they were cut from.

`join_leaves` undoes the cut: it interleaves rows, puts columns side by side and merges repeated scales.
`restore_tensors` undoes the change of storage: FP8 scales of rows become the 128x128 grid again, scalars get their own
dtype and shape. Neither shares code with `cut`: a proof that used the code it proves would prove nothing.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from dsv32_jax.errors import CheckpointError
from dsv32_jax.layout import Leaf
from dsv32_jax.quantization.quantize import FP8_BLOCK

from ..read.provenance import SourceTensor
from ..read.safetensors import DTYPES, Tensor
from ..read.weights import StoredWeight

Components = Mapping[str, np.ndarray]

CODES_PER_BYTE = 2


class NotInvertible(CheckpointError):
    """The components do not come from the recorded tensors."""


def join_leaves(leaves: Sequence[Leaf], parts: Sequence[Components], format: str, block: int) -> dict[str, np.ndarray]:
    """The components [out, in'] of one weight in the manifest's `format`, from those of all leaves it was cut into.

    `parts` are the components of each leaf (of one expert: without the expert axis); `block` is the inputs per scale
    of the whole weight. Raises NotInvertible where pieces that must agree do not.
    """
    if len(leaves[0].source_shape) == 1:
        return {"values": parts[0]["values"].reshape(leaves[0].source_shape)}
    inputs_per_element = {"values": 1, "codes": CODES_PER_BYTE, "block_scale": block}
    joined = {
        name: _join(leaves, [part[name] for part in parts], inputs_per_element[name], name)
        for name in parts[0]
        if name != "tensor_scale"
    }
    if format == "nvfp4":
        scales = [part["tensor_scale"].reshape(1) for part in parts]
        if any(_differ(scale, scales[0]) for scale in scales):
            raise NotInvertible(f"{leaves[0].sources[0]}: the tensor scales of its leaves differ")
        joined["tensor_scale"] = scales[0]
    return joined


def restore_tensors(joined: Components, stored: StoredWeight, sources: Sequence[SourceTensor]) -> dict[str, np.ndarray]:
    """The tensors of one weight, by name and bit for bit, from what `join_leaves` returned."""
    if stored.format == "dense":
        return {stored.values.name: _cast(joined["values"], stored.values)}
    assert stored.scale is not None
    scale = joined["block_scale"]
    if stored.format == "fp8_block":
        grid = collapse_scales(scale, stored.scale.shape, stored.scale.name)
        return {stored.values.name: joined["values"], stored.scale.name: _cast(grid, stored.scale)}
    assert stored.tensor_scale is not None
    bits = next(source.bits for source in sources if source.name == stored.tensor_scale.name)
    scalar = _restore_scalar(joined["tensor_scale"], stored.tensor_scale, bits)
    names = (stored.values.name, stored.scale.name, stored.tensor_scale.name)
    return dict(zip(names, (joined["codes"], scale.view(DTYPES[stored.scale.dtype]), scalar), strict=True))


def collapse_scales(row_scale: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    """float32 scales of rows [out, blocks] in the `shape` they were expanded from: grid, one per row, or a single one.

    Raises NotInvertible where rows of a block, or blocks of a row, have different scales.
    """
    out, blocks = row_scale.shape
    if (rows := -(-out // FP8_BLOCK)) and shape in ((rows, blocks), (rows, 1, blocks, 1)):
        small = row_scale[::FP8_BLOCK]
        again = np.repeat(small, FP8_BLOCK, axis=0)[:out]
    else:
        small = row_scale[:, :1] if shape in ((out, 1), (out,)) else row_scale[:1, :1]
        again = np.broadcast_to(small, row_scale.shape)
    if _differ(again, row_scale):
        raise NotInvertible(f"{name}: rows that shared a scale have different ones now")
    return _reshape(small, shape, name)


def _join(leaves: Sequence[Leaf], arrays: Sequence[np.ndarray], per: int, name: str) -> np.ndarray:
    """One component of the weight, an element for `per` inputs, from that of every leaf."""
    out, total = leaves[0].source_shape
    first = leaves[0]
    if first.cut is None and (total == first.shape[-1] or first.shape[-1] % per == 0):
        return arrays[0].reshape(out, -1)
    whole = np.empty((out, -(-total // per)), arrays[0].dtype)
    filled = np.zeros(whole.shape[1], bool)
    for leaf, array in zip(leaves, arrays, strict=True):
        rows, columns = _rows_of(leaf, whole), _columns_of(leaf, per)
        piece = array.reshape(*rows.shape[:-1], columns.size)
        if not filled.any() and columns.size == filled.size and (columns == np.arange(columns.size)).all():
            filled[:] = leaf.cut is not None and leaf.cut.axis == 1
            rows[...] = piece
            continue
        again = filled[columns]
        if _differ(rows[..., columns[again]], piece[..., again]):
            raise NotInvertible(f"{leaf.path}.{name} contradicts another leaf of {leaf.sources[0]}")
        rows[..., columns] = piece
        filled[columns] = True
        if _differ(rows[..., columns], piece):
            raise NotInvertible(f"{leaf.path}.{name}: pieces that shared an element differ now")
    return whole


def _rows_of(leaf: Leaf, whole: np.ndarray) -> np.ndarray:
    """The rows of `whole` that belong to `leaf`, as a view [runs, rows of a run, in'] or [rows, in']."""
    if leaf.cut is None or leaf.cut.axis == 1:
        return whole
    return whole.reshape(-1, leaf.cut.size, whole.shape[1])[:, leaf.cut.start : leaf.cut.stop]


def _columns_of(leaf: Leaf, per: int) -> np.ndarray:
    """The elements of a whole row that are the elements of `leaf`'s row, in order.

    Piece by piece: each starts at some input, and its j-th element is the one that holds input start + j x per.
    """
    total, width = leaf.source_shape[1], leaf.shape[-1]
    starts = np.arange(0, total, width)
    if leaf.cut is not None and leaf.cut.axis == 1:
        within = starts % leaf.cut.size
        starts = starts[(within >= leaf.cut.start) & (within < leaf.cut.stop)]
    return ((starts[:, None] + per * np.arange(-(-width // per))) // per).reshape(-1)


def _cast(array: np.ndarray, tensor: Tensor) -> np.ndarray:
    """`array` in the dtype and shape of `tensor`. Raises NotInvertible where that loses a bit."""
    dtype = DTYPES[tensor.dtype]
    found = array.astype(dtype, copy=False)
    if found.dtype != array.dtype and _differ(found.astype(array.dtype), array):
        raise NotInvertible(f"{tensor.name}: the {array.dtype.name} values are not exact in {dtype.name}")
    return _reshape(found, tensor.shape, tensor.name)


def _reshape(array: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    if array.size != math.prod(shape):
        raise NotInvertible(f"{name}: it was recorded as {list(shape)}, and {array.size} values are stored")
    return np.ascontiguousarray(array).reshape(shape)


def _restore_scalar(tensor_scale: np.ndarray, tensor: Tensor, bits: str) -> np.ndarray:
    """The tensor scale as the source had it; `bits` are the recorded bytes of one that was inverted."""
    if not bits:
        return _cast(tensor_scale, tensor)
    recorded = np.frombuffer(bytes.fromhex(bits), DTYPES[tensor.dtype]).reshape(tensor.shape)
    inverted = np.float32(1) / recorded.astype(np.float32).reshape(1)
    if _differ(inverted, tensor_scale.reshape(1)):
        raise NotInvertible(f"{tensor.name}: the stored tensor scale is not its inverse")
    return recorded


def _differ(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two arrays of one dtype differ in any bit; a NaN equals itself."""
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[first.dtype.itemsize]
    return bool((first.view(unsigned) != second.view(unsigned)).any())
