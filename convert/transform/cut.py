"""From source weights to one leaf of the model: cut rows or columns, split columns into axes, stack experts.

Every component is cut like the weight itself. A component has one element per `per` inputs (codes 2, scales 16, 32 or
128), so a run of inputs must start on an element, or lie within one, which is then repeated for each run. Where neither
holds, the leaf cannot keep its format and is stored as bfloat16.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dsv32_jax.checkpoint.reader import dtype_of
from dsv32_jax.layout import LOOKED_UP, Leaf

from ..read.safetensors import DTYPES
from ..read.weights import Read, StoredWeight
from .requantize import Requantizer

FOLDED = {
    "nvfp4-awq": "the scale of its inputs (pre_quant_scale, AWQ) has no place in NVFP4",
    "nvfp4-svd": "its low-rank part (svdquant_lora, SVDQuant) has no place in NVFP4",
}
"""Formats that are read but cannot be stored, and why: their factors are folded into the matrix."""

NAMES = {"fp8_block": "fp8", "bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def name_format(format: str, dtype: str) -> str:
    """Return the name of a format as users write it; plain arrays are named by their dtype."""
    name = dtype if format == "dense" else format
    return NAMES.get(name, name)


class LeafFormat(NamedTuple):
    """How a leaf is stored: manifest format, inputs per scale, dtype of dense values, why it was dequantized if so."""

    format: str
    block: int
    dtype: str
    dequantized: str | None = None

    @property
    def name(self) -> str:
        """The format as users write it: nvfp4, fp8, bf16 or f32."""
        return name_format(self.format, self.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class PlannedLeaf:
    """One leaf of the model: its source weights and how it is stored.

    `arrays`: dtype name and shape of each component. `same_as`: the source leaves this copy out, nothing is stored.
    `copy_of`: the source has the copy, which is stored only if it differs.
    """

    leaf: Leaf
    sources: tuple[StoredWeight, ...]
    form: LeafFormat
    arrays: dict[str, tuple[str, tuple[int, ...]]]
    same_as: str | None = None
    copy_of: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all components."""
        return sum(math.prod(shape) * dtype_of(name).itemsize for name, shape in self.arrays.values())


def choose_format(leaf: Leaf, sources: Sequence[StoredWeight]) -> LeafFormat:
    """Return the format the sources of `leaf` become, or bfloat16 if the leaf cannot be stored in it."""
    formats = sorted({stored.becomes for stored in sources})
    if {format for format, _ in formats} == {"dense"}:
        dtypes = {DTYPES[stored.values.dtype].name if stored.wanted is None else "bfloat16" for stored in sources}
        folded = sorted({FOLDED[stored.format] for stored in sources if stored.format in FOLDED})
        return LeafFormat("dense", 1, dtypes.pop() if len(dtypes) == 1 else "float32", " and ".join(folded) or None)
    (format, block), *others = formats
    if leaf.path.endswith(LOOKED_UP):
        reason = "its rows are looked up"
    elif others:
        kinds = " and ".join(f"{format} in blocks of {block}" for format, block in formats)
        reason = f"its experts are stored as {kinds}"
    elif _select_elements(leaf, format, block) is None:
        reason = f"runs of {leaf.shape[-1]} inputs straddle scale blocks of {block}"
    else:
        return LeafFormat(format, block, "")
    return LeafFormat("dense", 1, "bfloat16", reason)


def list_arrays(leaf: Leaf, form: LeafFormat) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the dtype name and shape of every component of `leaf` in the format `form`."""
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
    leaf: Leaf, sources: Sequence[StoredWeight], form: LeafFormat, read: Read, requantizer: Requantizer | None = None
) -> dict[str, np.ndarray]:
    """Return the components of `leaf`, C-contiguous. `requantizer` quantizes and dequantizes (default: rounding to
    nearest)."""
    components, steps = plan_build(leaf, sources, form, read, requantizer or Requantizer())
    for step in steps:
        step()
    return components


def plan_build(
    leaf: Leaf, sources: Sequence[StoredWeight], form: LeafFormat, read: Read, requantizer: Requantizer
) -> tuple[dict[str, np.ndarray], list[Callable[[], None]]]:
    """Return a dict for the components of `leaf`, and the steps that fill it: one per source, for any thread.

    Peak memory: the leaf, and the sources in work.
    """
    components: dict[str, np.ndarray] = {}
    if leaf.stacked:
        arrays = list_arrays(leaf, form).items()
        components |= {name: np.empty(shape, dtype_of(dtype)) for name, (dtype, shape) in arrays}

    def fill(expert: int, stored: StoredWeight) -> None:
        for name, array in _build_one(leaf, stored, form, read, requantizer).items():
            if not leaf.stacked:
                components[name] = np.ascontiguousarray(array)
                continue
            whole = components[name]
            assert (array.dtype, array.shape) == (whole.dtype, whole.shape[1:]), f"{stored.name} has another format"
            whole[expert] = array

    return components, [functools.partial(fill, expert, stored) for expert, stored in enumerate(sources)]


def _build_one(
    leaf: Leaf, stored: StoredWeight, form: LeafFormat, read: Read, requantizer: Requantizer
) -> dict[str, np.ndarray]:
    """Return what one source weight contributes to `leaf`."""
    if form.dequantized is not None:
        stored = dataclasses.replace(stored, wanted="bf16")
    components = requantizer.load(stored, read)
    if form.format == "dense":
        components = {"values": components["values"].astype(form.dtype, copy=False)}
    elements = _select_elements(leaf, form.format, form.block)
    assert elements is not None
    rank = len(leaf.shape) - leaf.stacked
    return {
        name: array.reshape((1,) * rank) if name == "tensor_scale" else _cut_array(leaf, array, elements[name])
        for name, array in components.items()
    }


def _cut_array(leaf: Leaf, array: np.ndarray, elements: np.ndarray) -> np.ndarray:
    """Return the part of `array` [out, in'] that belongs to `leaf`, in the leaf's axes; `elements` [runs, width']."""
    if leaf.cut is not None and leaf.cut.axis == 0:
        runs = array.reshape(-1, leaf.cut.size, *array.shape[1:])
        array = runs[:, leaf.cut.start : leaf.cut.stop].reshape(-1, *array.shape[1:])
    if array.ndim == 1:
        return array.reshape(leaf.shape)
    if elements.size != array.shape[1] or (elements.ravel() != np.arange(array.shape[1])).any():
        array = array[:, elements.ravel()]
    return array.reshape(*leaf.shape[leaf.stacked : -1], elements.shape[1])


def _select_elements(leaf: Leaf, format: str, block: int) -> dict[str, np.ndarray] | None:
    """Return for each component but the scalar which of its elements [runs, width'] a row of the leaf takes.

    None if a run of the input axis would need parts of elements.
    """
    if len(leaf.source_shape) == 1:
        return {"values": np.zeros((1, 1), int)}
    total, width = leaf.source_shape[1], leaf.shape[-1]
    size, first, last = leaf.cut[1:] if leaf.cut is not None and leaf.cut.axis == 1 else (total, 0, total)
    starts = np.array([run + at for run in range(0, total, size) for at in range(first, last, width)])
    if format == "dense":
        return {"values": _list_elements(starts, width, 1)}
    repeated = ((starts % block) + width <= block).all()
    if (starts % block).any() and not repeated:
        return None
    scale = (starts // block)[:, None] if repeated else _list_elements(starts, width, block)
    if format == "fp8_block":
        return {"values": _list_elements(starts, width, 1), "block_scale": scale}
    if (starts % 2).any() or width % 2 or (width % block and not repeated):
        return None
    return {"codes": _list_elements(starts, width, 2), "block_scale": scale}


def _list_elements(starts: np.ndarray, width: int, per: int) -> np.ndarray:
    """Return the elements of runs that start on an element; the last element of a run may be partial."""
    return (starts // per)[:, None] + np.arange(-(-width // per))
