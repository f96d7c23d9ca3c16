"""Manifest entries of converted parameters: checksums, source tensors, and checks of the values."""

import hashlib

import numpy as np

from dsv32_jax.checkpoint.manifest import LeafEntry
from dsv32_jax.checkpoint.provenance import Passport, SourceTensor
from dsv32_jax.errors import CheckpointError, listing

from ..plan.plan import PlannedLeaf
from ..read.safetensors import DTYPES, Tensor
from ..read.weights import Read, StoredWeight
from ..transform import array_facts

SCALAR_BYTES = 8
FIRST_BYTES = 1 << 12
"""Enough to see that a tensor is not constant, but for very few."""


class HashingReader:
    """Reads tensors and keeps the SHA-256 of each, and the bytes of scalars. Threads may share it."""

    def __init__(self, read: Read):
        self._read = read
        self._sources: dict[str, SourceTensor] = {}
        self._zero: set[str] = set()
        self._constant: set[str] = set()

    def __call__(self, tensor: Tensor) -> np.ndarray:
        array = self._read(tensor)
        if tensor.name not in self._sources:
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            if not raw[:FIRST_BYTES].any() and not raw.any():
                self._zero.add(tensor.name)
            elif (raw[:FIRST_BYTES] == raw[0]).all() and (raw == raw[0]).all():
                self._constant.add(tensor.name)
            sha256 = hashlib.sha256(raw.data).hexdigest()
            bits = raw.tobytes().hex() if tensor.nbytes <= SCALAR_BYTES else ""
            self._sources[tensor.name] = SourceTensor(tensor.name, tensor.dtype, tensor.shape, sha256, bits)
        return array

    def source(self, tensor: Tensor, with_bits: bool) -> SourceTensor:
        """Provenance of a tensor, which is read if it was not; `with_bits` keeps the bytes of a scalar."""
        if tensor.name not in self._sources:
            self(tensor)
        found = self._sources[tensor.name]
        return found if with_bits else found._replace(bits="")

    def require_downloaded(self, planned: PlannedLeaf) -> None:
        """Raise CheckpointError that lists the source matrices of a parameter which are zero throughout.

        A download that reserves its space first leaves such holes. In NVFP4 a matrix of zeros is stored with a tensor
        scale of zero, or with block scales that are all the same.
        """
        holes = []
        for stored in planned.sources:
            if len(stored.shape) == 2 and not self._is_zero_matrix(stored):
                holes += [t for t in (stored.values, stored.scale) if t is not None and t.name in self._zero]
        if holes:
            names = listing(f"{tensor.name} ({tensor.file.name})" for tensor in holes)
            raise CheckpointError(
                f"{len(holes)} tensors of {planned.leaf.path} are zero throughout: {names}. The files have their full "
                "size but were not downloaded completely: download them again. Completed parts are kept"
            )

    def _is_zero_matrix(self, stored: StoredWeight) -> bool:
        if stored.tensor_scale is None or stored.scale is None:
            return False
        return stored.tensor_scale.name in self._zero or stored.scale.name in self._constant


def describe(
    planned: PlannedLeaf, arrays: dict[str, np.ndarray], original: LeafEntry | None, read: HashingReader
) -> tuple[LeafEntry, dict[str, int]]:
    """The manifest entry of a parameter whose components are `arrays`, and the counts of odd scales in it.

    A copy with the bytes of its `original` shares its arrays. Raises CheckpointError on values that cannot be right.
    """
    read.require_downloaded(planned)
    array_facts.require_finite(planned.leaf.path, arrays)
    form = planned.form.format
    entry = LeafEntry(
        form, {name: array_facts.describe_array(array) for name, array in arrays.items()}, planned.same_as
    )
    if entry == original:
        entry = LeafEntry(form, {}, planned.copy_of)
    scales = array_facts.count_odd_scales(arrays)
    passport = Passport(
        amax=array_facts.amax(arrays) if arrays else 0.0,
        nan_scales=scales.get("nan_scale_bytes", 0),
        zero_blocks=scales.get("zero_blocks", 0),
        change=describe_change(planned),
        cut=planned.leaf.cut,
        sources=tuple(
            read.source(tensor, stored.kind == "packed-nvfp4" and tensor is stored.tensor_scale)
            for stored in planned.sources
            for tensor in stored.tensors
        ),
    )
    return LeafEntry(entry.format, entry.arrays, entry.same_as, passport), scales


def describe_change(planned: PlannedLeaf) -> str:
    """How the conversion changes the values of a parameter; empty where every bit is kept."""
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
