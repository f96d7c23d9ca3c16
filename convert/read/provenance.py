"""The provenance of a weight, which the manifest keeps: the tensors it was made of, and how.

None of it is part of the manifest's digest: two ways to the same arrays give the same digest.
"""

import hashlib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import numpy as np

from dsv32_jax.checkpoint.folder import RECOVER
from dsv32_jax.checkpoint.manifest import LeafEntry
from dsv32_jax.errors import CheckpointError, listing, pluralize
from dsv32_jax.layout import Cut
from dsv32_jax.system.files import find_mismatches

from .safetensors import DTYPES, Tensor, make_tensor
from .weights import Read, StoredWeight

FORM = {"change": str, "cut": (list, type(None)), "sources": [list]}

SCALAR_BYTES = 8
FIRST_BYTES = 1 << 12
"""Enough to see that a tensor is not constant, but for very few."""


class SourceTensor(NamedTuple):
    """One tensor of the source: dtype as safetensors names it, SHA-256 of its bytes.

    `bits` are its bytes in hexadecimal where the stored arrays do not determine them. That is compressed-tensors'
    global scale, whose float32 inverse is stored: two floats can have the same inverse.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    bits: str = ""


class Provenance(NamedTuple):
    """Where a weight came from. `change` says what was done to its values, empty where every bit was kept.

    `cut` is the part of its sources that it takes, None for all of it; `sources` are their tensors, expert by expert,
    none where the source left a copy out.
    """

    change: str
    cut: Cut | None
    sources: tuple[SourceTensor, ...]

    @classmethod
    def of(cls, entry: LeafEntry) -> Self | None:
        """Return what the manifest recorded of a weight, None if nothing. Raises CheckpointError if it cannot be."""
        raw = entry.provenance
        if raw is None:
            return None
        problems = find_mismatches(raw, FORM, "provenance")
        if not problems and raw["cut"] is not None and not (len(raw["cut"]) == 4 and _are_sizes(raw["cut"])):
            problems = [f"provenance.cut is {raw['cut']!r:.200}"]
        if problems:
            raise CheckpointError(f"the provenance of a weight is invalid: {listing(problems)}. {RECOVER}")
        cut = None if raw["cut"] is None else Cut(*raw["cut"])
        return cls(raw["change"], cut, tuple(map(_parse_source, raw["sources"])))

    def to_json(self) -> dict[str, Any]:
        """Return the JSON that `of` reads back."""
        sources = [[t.name, t.dtype, list(t.shape), t.sha256, *([t.bits] if t.bits else [])] for t in self.sources]
        return {"change": self.change, "cut": self.cut and list(self.cut), "sources": sources}


def list_sources(entries: Iterable[LeafEntry]) -> dict[str, SourceTensor]:
    """Return the source tensors of all these weights by name."""
    found = (Provenance.of(entry) for entry in entries)
    return {tensor.name: tensor for one in found if one is not None for tensor in one.sources}


def _parse_source(row: list[Any]) -> SourceTensor:
    """Return a recorded tensor. Raises CheckpointError unless it can have been one: of a dtype that there is, bits of
    its size."""
    if len(row) in (4, 5) and _are_sizes(row[2]) and all(type(text) is str for text in (*row[:2], *row[3:])):
        found = SourceTensor(row[0], row[1], tuple(row[2]), *row[3:])
        if found.dtype in DTYPES and re.fullmatch("[0-9a-f]{64}", found.sha256):
            nbytes = min(make_tensor(found.name, found.dtype, found.shape).nbytes, SCALAR_BYTES)
            if not found.bits or re.fullmatch(f"[0-9a-f]{{{2 * nbytes}}}", found.bits):
                return found
    raise CheckpointError(f"the provenance of a weight has {row!r:.200}, which is no tensor. {RECOVER}")


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


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

    def list_sources(self, weights: Iterable[StoredWeight]) -> Iterable[SourceTensor]:
        """Yield the tensors of `weights`, which are read if they were not; of the scalars the bytes of those that are
        stored inverted."""
        for stored in weights:
            for tensor in stored.tensors:
                if tensor.name not in self._sources:
                    self(tensor)
                found = self._sources[tensor.name]
                is_inverted = stored.kind == "packed-nvfp4" and tensor is stored.tensor_scale
                yield found if is_inverted else found._replace(bits="")

    def require_downloaded(self, path: str, weights: Iterable[StoredWeight]) -> None:
        """Raise CheckpointError that lists the matrices among the `weights` of a parameter which are zero throughout.

        A download that reserves its space first leaves such holes. In NVFP4 a matrix of zeros is stored with a tensor
        scale of zero, or with block scales that are all the same.
        """
        holes = []
        for stored in weights:
            scalar, scale = stored.tensor_scale, stored.scale
            is_zero = scalar and scale and (scalar.name in self._zero or scale.name in self._constant)
            if len(stored.shape) == 2 and not is_zero:
                holes += [t for t in (stored.values, stored.scale) if t is not None and t.name in self._zero]
        if holes:
            names = listing(f"{tensor.name} ({tensor.file.name})" for tensor in holes)
            count = pluralize(len(holes), "tensor") + (" is" if len(holes) == 1 else " are")
            raise CheckpointError(
                f"{path}: {count} zero throughout: {names}. The files have their full size but were not downloaded "
                "completely: download them again. Completed parts are kept"
            )
