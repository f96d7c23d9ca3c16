"""From the weights of the source to one leaf of the model: cut rows or columns, split columns in axes, stack experts.

Every component is cut like the weight itself. A component has one element for `per` inputs (codes 2, scales 16, 32 or
128), so a piece of the input axis must start on an element, or lie within one, which is then repeated in each piece.
Where neither holds the leaf cannot keep its format and is stored as bfloat16.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dsv32_jax.layout import Leaf

from ..read.header import BY_NAME
from ..read.stored import FOLDED, Stored
from ..read.weights import Read
from .requantize import Recaster

FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


class Form(NamedTuple):
    """How a leaf is stored: manifest format, inputs per scale, dtype of dense values, and why it was dequantized."""

    format: str
    block: int
    dtype: str
    dequantized: str | None = None


def choose(leaf: Leaf, sources: Sequence[Stored]) -> Form:
    """The format in which `leaf` keeps its sources: the one they become, or bfloat16 where that is impossible."""
    formats = sorted({stored.becomes for stored in sources})
    if {format for format, _ in formats} == {"dense"}:
        dtypes = {FLOATS[stored.values.dtype] if stored.wanted is None else "bfloat16" for stored in sources}
        folded = sorted({FOLDED[stored.format] for stored in sources if stored.format in FOLDED})
        return Form("dense", 1, dtypes.pop() if len(dtypes) == 1 else "float32", " and ".join(folded) or None)
    if len(formats) > 1:
        kinds = " and ".join(f"{format} in blocks of {block}" for format, block in formats)
        return Form("dense", 1, "bfloat16", f"its experts are stored as {kinds}")
    ((format, block),) = formats
    if _elements(leaf, format, block) is None:
        return Form("dense", 1, "bfloat16", f"pieces of {leaf.shape[-1]} inputs straddle scale blocks of {block}")
    return Form(format, block, "")


def arrays(leaf: Leaf, form: Form) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype name and shape of every component of `leaf` in `form`."""
    outer, width = leaf.shape[:-1], leaf.shape[-1]
    blocks = (*outer, -(-width // form.block))
    if form.format == "dense":
        return {"values": (form.dtype, leaf.shape)}
    if form.format == "fp8_block":
        return {"values": ("float8_e4m3fn", leaf.shape), "block_scale": ("float32", blocks)}
    scalars = tuple(size if leaf.stacked and axis == 0 else 1 for axis, size in enumerate(leaf.shape))
    return {
        "codes": ("uint8", (*outer, width // 2)),
        "block_scale": ("float8_e4m3fn", blocks),
        "tensor_scale": ("float32", scalars),
    }


def build(
    leaf: Leaf,
    sources: Sequence[Stored],
    form: Form,
    read: Read,
    recaster: Recaster | None = None,
    spread: Callable[..., Iterable] = map,
) -> dict[str, np.ndarray]:
    """The components of `leaf`, C-contiguous. Peak memory: the leaf and, where experts are stacked, those in work.

    `recaster` quantizes and dequantizes (default: by rounding to nearest); `spread` is a `map` that may use threads.
    """
    recaster = recaster or Recaster()
    if not leaf.stacked:
        parts = _one(leaf, sources[0], form, read, recaster)
        return {name: np.ascontiguousarray(array) for name, array in parts.items()}
    stacked = {name: np.empty(shape, BY_NAME[dtype]) for name, (dtype, shape) in arrays(leaf, form).items()}

    def fill(expert: int, stored: Stored) -> None:
        for name, array in _one(leaf, stored, form, read, recaster).items():
            whole = stacked[name]
            assert (array.dtype, array.shape) == (whole.dtype, whole.shape[1:]), f"{stored.name} is of another form"
            whole[expert] = array

    collections.deque(spread(lambda item: fill(*item), enumerate(sources)), maxlen=0)
    return stacked


def _one(leaf: Leaf, stored: Stored, form: Form, read: Read, recaster: Recaster) -> dict[str, np.ndarray]:
    """What one source contributes to `leaf`."""
    if form.dequantized is not None:
        stored = dataclasses.replace(stored, wanted="bf16")
    parts = recaster.load(stored, read)
    if form.format == "dense":
        parts = {"values": parts["values"].astype(form.dtype, copy=False)}
    elements = _elements(leaf, form.format, form.block)
    assert elements is not None
    rank = len(leaf.shape) - leaf.stacked
    return {
        name: array.reshape((1,) * rank) if name == "tensor_scale" else _cut(leaf, array, elements[name])
        for name, array in parts.items()
    }


def _cut(leaf: Leaf, array: np.ndarray, elements: np.ndarray) -> np.ndarray:
    """The part of `array` [out, in'] that belongs to `leaf`, in the leaf's axes; `elements` [pieces, width']."""
    if leaf.cut is not None and leaf.cut.axis == 0:
        runs = array.reshape(-1, leaf.cut.size, *array.shape[1:])
        array = runs[:, leaf.cut.start : leaf.cut.stop].reshape(-1, *array.shape[1:])
    if array.ndim == 1:
        return array.reshape(leaf.shape)
    if elements.size != array.shape[1] or (elements.ravel() != np.arange(array.shape[1])).any():
        array = array[:, elements.ravel()]
    return array.reshape(*leaf.shape[leaf.stacked : -1], elements.shape[1])


def _elements(leaf: Leaf, format: str, block: int) -> dict[str, np.ndarray] | None:
    """For each component but the scalar, which of its elements [pieces, width'] a row of the leaf takes.

    None when a piece of the input axis would need parts of elements.
    """
    if len(leaf.source_shape) == 1:
        return {"values": np.zeros((1, 1), int)}
    total, width = leaf.source_shape[1], leaf.shape[-1]
    size, first, last = leaf.cut[1:] if leaf.cut is not None and leaf.cut.axis == 1 else (total, 0, total)
    starts = np.array([run + at for run in range(0, total, size) for at in range(first, last, width)])
    if format == "dense":
        return {"values": _aligned(starts, width, 1)}
    repeated = ((starts % block) + width <= block).all()
    if (starts % block).any() and not repeated:
        return None
    scale = (starts // block)[:, None] if repeated else _aligned(starts, width, block)
    if format == "fp8_block":
        return {"values": _aligned(starts, width, 1), "block_scale": scale}
    if (starts % 2).any() or width % 2 or (width % block and not repeated):
        return None
    return {"codes": _aligned(starts, width, 2), "block_scale": scale}


def _aligned(starts: np.ndarray, width: int, per: int) -> np.ndarray:
    """The elements of pieces that start on an element; the last element of a piece may be partial."""
    return (starts // per)[:, None] + np.arange(-(-width // per))
