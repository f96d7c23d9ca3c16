"""The way back: from the components of the leaves to the tensors of the source they were cut from.

`join` undoes the cut: rows interleaved again, columns put side by side, scales that were repeated for pieces merged.
`restored` undoes the change of storage: FP8 scales of rows become the 128x128 grid again, scalars get their own dtype
and shape. Neither shares code with `cut`, because a proof that used the code it proves would prove nothing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dsv32_jax.checkpoint.provenance import SourceTensor
from dsv32_jax.errors import CheckpointError
from dsv32_jax.layout import Leaf
from dsv32_jax.quantization.quantize import FP8_BLOCK

from ..read.safetensors import DTYPES, Tensor
from ..read.weights import StoredWeight, detect

Components = Mapping[str, np.ndarray]

PER_CODE = 2
"""Inputs in one byte of NVFP4 codes."""


class NotInvertible(CheckpointError):
    """The components do not come from the tensors they are said to come from."""


def described(name: str, sources: Sequence[SourceTensor]) -> StoredWeight:
    """How the weight `name` was stored, from what the passport says of its tensors."""
    return detect(name, {t.name: Tensor(t.name, Path(), t.dtype, t.shape, 0, _nbytes(t)) for t in sources})


def join(leaves: Sequence[Leaf], parts: Sequence[Components], format: str, block: int) -> dict[str, np.ndarray]:
    """The components [out, in'] of one weight in the manifest's `format`, from those of all leaves it was cut into.

    `parts` are the components of each leaf (of one expert: without the expert axis); `block` is the inputs per scale of
    the whole weight. Raises NotInvertible when pieces that must agree do not.
    """
    if len(leaves[0].source_shape) == 1:
        return {"values": parts[0]["values"].reshape(leaves[0].source_shape)}
    per = {"values": 1, "codes": PER_CODE, "block_scale": block}
    names = [name for name in parts[0] if name != "tensor_scale"]
    joined = {name: _joined(leaves, [part[name] for part in parts], per[name], name) for name in names}
    if format == "nvfp4":
        scales = [part["tensor_scale"].reshape(1) for part in parts]
        if any(_bits(scale) != _bits(scales[0]) for scale in scales):
            raise NotInvertible(f"{leaves[0].sources[0]}: the tensor scales of its leaves differ")
        joined["tensor_scale"] = scales[0]
    return joined


def restored(joined: Components, stored: StoredWeight, sources: Sequence[SourceTensor]) -> dict[str, np.ndarray]:
    """The tensors of one weight, by name, each bit as it was, from what `join` returned."""
    if stored.format == "dense":
        return {stored.values.name: _cast(joined["values"], stored.values)}
    assert stored.scale is not None
    scale = joined["block_scale"]
    if stored.format == "fp8_block":
        collapsed = collapse(scale, stored.scale.shape, stored.scale.name)
        return {stored.values.name: joined["values"], stored.scale.name: _cast(collapsed, stored.scale)}
    assert stored.tensor_scale is not None
    bits = next(source.bits for source in sources if source.name == stored.tensor_scale.name)
    scalar = _scalar(joined["tensor_scale"], stored.tensor_scale, bits)
    names = (stored.values.name, stored.scale.name, stored.tensor_scale.name)
    return dict(zip(names, (joined["codes"], scale.view(DTYPES[stored.scale.dtype]), scalar), strict=True))


def collapse(row_scale: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    """float32 scales of rows [out, blocks] in the `shape` they were expanded from: grid, one a row, or one for all.

    Raises NotInvertible when rows of a block, or blocks of a row, have different scales.
    """
    out, blocks = row_scale.shape
    if shape == (-(-out // FP8_BLOCK), blocks):
        small = row_scale[::FP8_BLOCK]
        again = np.repeat(small, FP8_BLOCK, axis=0)[:out]
    else:
        small = row_scale[:, :1] if shape == (out, 1) else row_scale[:1, :1]
        again = np.broadcast_to(small, row_scale.shape)
    if (_unsigned(again) != _unsigned(row_scale)).any():
        raise NotInvertible(f"{name}: rows that shared a scale have different ones now")
    return np.ascontiguousarray(small).reshape(shape)


def _joined(leaves: Sequence[Leaf], arrays: Sequence[np.ndarray], per: int, name: str) -> np.ndarray:
    """One component of the weight, an element for `per` inputs, from that of every leaf."""
    out, total = leaves[0].source_shape
    first = leaves[0]
    if first.cut is None and (total == first.shape[-1] or first.shape[-1] % per == 0):
        return arrays[0].reshape(out, -1)
    whole = np.empty((out, -(-total // per)), arrays[0].dtype)
    filled = np.zeros(whole.shape[1], bool)
    for leaf, array in zip(leaves, arrays, strict=True):
        rows, columns = _rows(leaf, whole), _columns(leaf, per)
        piece = array.reshape(*rows.shape[:-1], columns.size)
        if not filled.any() and columns.size == filled.size and (columns == np.arange(columns.size)).all():
            filled[:] = leaf.cut is not None and leaf.cut.axis == 1
            rows[...] = piece
            continue
        again = filled[columns]
        if (_unsigned(rows[..., columns[again]]) != _unsigned(piece[..., again])).any():
            raise NotInvertible(f"{leaf.path}.{name} contradicts another leaf of {leaf.sources[0]}")
        rows[..., columns] = piece
        filled[columns] = True
        if (_unsigned(rows[..., columns]) != _unsigned(piece)).any():
            raise NotInvertible(f"{leaf.path}.{name}: pieces that shared an element differ now")
    return whole


def _rows(leaf: Leaf, whole: np.ndarray) -> np.ndarray:
    """The rows of `whole` that belong to `leaf`, as a view [runs, rows of a run, in'] or [rows, in']."""
    if leaf.cut is None or leaf.cut.axis == 1:
        return whole
    return whole.reshape(-1, leaf.cut.size, whole.shape[1])[:, leaf.cut.start : leaf.cut.stop]


def _columns(leaf: Leaf, per: int) -> np.ndarray:
    """Which elements of a whole row the elements of `leaf`'s row are, in order.

    Piece by piece: each starts at some input, and its j-th element is the one that holds input start + j x per.
    """
    total, width = leaf.source_shape[1], leaf.shape[-1]
    starts = np.arange(0, total, width)
    if leaf.cut is not None and leaf.cut.axis == 1:
        within = starts % leaf.cut.size
        starts = starts[(within >= leaf.cut.start) & (within < leaf.cut.stop)]
    return ((starts[:, None] + per * np.arange(-(-width // per))) // per).reshape(-1)


def _cast(array: np.ndarray, tensor: Tensor) -> np.ndarray:
    """`array` in the dtype and shape of `tensor`, of which it holds every bit."""
    dtype = DTYPES[tensor.dtype]
    found = array.astype(dtype, copy=False)
    if found.dtype != array.dtype and (_unsigned(found.astype(array.dtype)) != _unsigned(array)).any():
        raise NotInvertible(f"{tensor.name}: {array.dtype.name} values are no {dtype.name} any more")
    return np.ascontiguousarray(found).reshape(tensor.shape)


def _scalar(tensor_scale: np.ndarray, tensor: Tensor, bits: str) -> np.ndarray:
    """The tensor scale as the source had it; `bits` are the bytes of one that was inverted."""
    if not bits:
        return _cast(tensor_scale, tensor)
    raw = np.frombuffer(bytes.fromhex(bits), DTYPES[tensor.dtype]).reshape(tensor.shape)
    inverted = np.float32(1) / raw.astype(np.float32).reshape(1)
    if _bits(inverted) != _bits(tensor_scale):
        raise NotInvertible(f"{tensor.name}: the stored tensor scale is not its inverse")
    return raw


def _nbytes(source: SourceTensor) -> int:
    return int(np.prod(source.shape, dtype=np.int64)) * DTYPES[source.dtype].itemsize


def _bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def _unsigned(array: np.ndarray) -> np.ndarray:
    """The bits of `array`, in which NaN equals itself."""
    return array.view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[array.dtype.itemsize])
