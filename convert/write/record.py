"""What is remembered of the source while it is converted: the SHA-256 of every tensor, a passport for every leaf."""

import hashlib

import numpy as np

from dsv32_jax.checkpoint.manifest import LeafEntry
from dsv32_jax.checkpoint.provenance import Passport, SourceTensor
from dsv32_jax.errors import CheckpointError, listing

from ..plan.plan import PlannedLeaf
from ..read.safetensors import DTYPES, Tensor
from ..read.weights import Read, StoredWeight
from ..transform import array_facts
from ..transform.array_facts import amax

SCALAR_BYTES = 8
GLANCE = 1 << 12
"""Bytes that are enough to see that a tensor is not zero throughout, but for very few."""


class Recorder:
    """Reads tensors and remembers the SHA-256 of each, and the bytes of scalars. Threads may share it."""

    def __init__(self, read: Read):
        self._read = read
        self.sha256: dict[str, str] = {}
        self.bits: dict[str, str] = {}
        self.zero: set[str] = set()
        self.uniform: set[str] = set()

    def __call__(self, tensor: Tensor) -> np.ndarray:
        array = self._read(tensor)
        if tensor.name not in self.sha256:
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            self.sha256[tensor.name] = hashlib.sha256(raw.data).hexdigest()
            if tensor.nbytes <= SCALAR_BYTES:
                self.bits[tensor.name] = raw.tobytes().hex()
            if not raw[:GLANCE].any() and not raw.any():
                self.zero.add(tensor.name)
            elif raw.size and (raw[:GLANCE] == raw[0]).all() and (raw == raw[0]).all():
                self.uniform.add(tensor.name)
        return array

    def require_written(self, planned: PlannedLeaf) -> None:
        """Raise CheckpointError that lists the matrices of a leaf which are zero throughout.

        A download that reserves its space first leaves such holes. NVFP4 can say that a matrix is meant to be zero: by
        a tensor scale of zero, or by block scales that are all the same.
        """
        holes = []
        for stored in planned.sources:
            if len(stored.shape) == 2 and not self._is_meant(stored):
                holes += [t for t in (stored.values, stored.scale) if t is not None and t.name in self.zero]
        if holes:
            names = listing(f"{tensor.name} ({tensor.file.name})" for tensor in holes)
            raise CheckpointError(
                f"{len(holes)} tensors of {planned.leaf.path} are zero throughout: {names}. The files have their full "
                "size but were not downloaded completely: download them again. What was written before is kept"
            )

    def _is_meant(self, stored: StoredWeight) -> bool:
        if stored.tensor_scale is None:
            return False
        return stored.tensor_scale.name in self.zero or (stored.scale is not None and stored.scale.name in self.uniform)


def with_passport(planned: PlannedLeaf, entry: LeafEntry, built: dict[str, np.ndarray], read: Recorder) -> LeafEntry:
    """`entry` with the passport of the leaf: `built` are its arrays (none where the source leaves it out)."""
    scales = array_facts.count_odd_scales(built)
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
    dtypes = {DTYPES[stored.values.dtype].name for stored in planned.sources if stored.format == "dense"}
    if form.format == "dense" and form.dtype != "float32" and dtypes - {form.dtype}:
        return f"{' and '.join(sorted(dtypes - {form.dtype}))} became {form.dtype}"
    return ""
