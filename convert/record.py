"""What is remembered of the source while it is converted: the SHA-256 of every tensor, and a passport for every leaf."""

import hashlib

import numpy as np

from dsv32_jax.manifest import LeafEntry
from dsv32_jax.passport import Passport, SourceTensor

from . import facts
from .amax import amax
from .cut import FLOATS
from .header import Tensor
from .plan import PlannedLeaf
from .weights import Read

SCALAR_BYTES = 8


class Recorder:
    """Reads tensors and remembers the SHA-256 of each, and the bytes of scalars. Threads may share it."""

    def __init__(self, read: Read):
        self._read = read
        self.sha256: dict[str, str] = {}
        self.bits: dict[str, str] = {}

    def __call__(self, tensor: Tensor) -> np.ndarray:
        array = self._read(tensor)
        if tensor.name not in self.sha256:
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            self.sha256[tensor.name] = hashlib.sha256(raw.data).hexdigest()
            if tensor.nbytes <= SCALAR_BYTES:
                self.bits[tensor.name] = raw.tobytes().hex()
        return array


def with_passport(planned: PlannedLeaf, entry: LeafEntry, built: dict[str, np.ndarray], read: Recorder) -> LeafEntry:
    """`entry` with the passport of the leaf: `built` are its arrays (none where the source leaves it out)."""
    scales = facts.scale_facts(built)
    sources = []
    for stored in planned.sources:
        for tensor in stored.tensors:
            if tensor.name not in read.sha256:
                read(tensor)
            divisor = stored.kind == "packed-nvfp4" and tensor is stored.tensor_scale
            bits = read.bits[tensor.name] if divisor else ""
            sources.append(SourceTensor(tensor.name, tensor.dtype, tensor.shape, read.sha256[tensor.name], bits))
    passport = Passport(
        amax=amax(built) if built else 0.0,
        nan_scales=scales.get("nan_scale_bytes", 0),
        zero_blocks=scales.get("zero_blocks", 0),
        change=change(planned),
        cut=planned.leaf.cut,
        sources=tuple(sources),
    )
    return LeafEntry(entry.format, entry.arrays, entry.same_as, passport)


def change(planned: PlannedLeaf) -> str:
    """What the conversion does to the values of a leaf, empty where it keeps every bit."""
    form = planned.form
    if form.dequantized is not None:
        return f"dequantized to {form.dtype}: {form.dequantized}"
    formats = sorted({stored.format for stored in planned.sources} - {form.format})
    if formats:
        return f"{' and '.join(formats)} became {form.dtype or form.format}"
    dtypes = {FLOATS[stored.values.dtype] for stored in planned.sources if stored.format == "dense"}
    if form.format == "dense" and form.dtype != "float32" and dtypes - {form.dtype}:
        return f"{' and '.join(sorted(dtypes - {form.dtype}))} became {form.dtype}"
    return ""
