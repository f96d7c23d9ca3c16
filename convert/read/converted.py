"""A converted checkpoint weight by weight: for each weight of the source, the components of the parameters it became.

Every array is hashed while it is read, so whoever uses the weights learns of damage. Memory: one group, or where
experts are stacked about `reader.SLAB_BYTES` of each component.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsv32_jax.checkpoint.manifest import LeafEntry, Manifest
from dsv32_jax.checkpoint.provenance import SourceTensor
from dsv32_jax.checkpoint.reader import Key, Reader, raw
from dsv32_jax.config import Config
from dsv32_jax.errors import CheckpointError, DsvError, StorageError, VerificationError
from dsv32_jax.layout import Leaf, leaves
from dsv32_jax.quantization.quantize import FP8_BLOCK, NVFP4_BLOCK
from dsv32_jax.system.files import expand_path

from .safetensors import DTYPES, Tensor
from .weights import StoredWeight, detect

Components = dict[str, np.ndarray]
"""The arrays of one parameter, or of one expert of it, by component (manifest.COMPONENTS)."""


class Weight(NamedTuple):
    """One weight of the source: the parameters it was cut into, its expert, its tensors (none if it was left out)."""

    name: str
    leaves: tuple[Leaf, ...]
    entries: tuple[LeafEntry, ...]
    expert: int
    sources: tuple[SourceTensor, ...]

    @property
    def formats(self) -> tuple[str, ...]:
        """The manifest's format of each parameter."""
        return tuple(entry.format for entry in self.entries)

    @property
    def change(self) -> str:
        """How the conversion changed its values; empty where every bit is kept."""
        passports = [entry.passport for entry in self.entries]
        texts = {"its source is not recorded" if one is None else one.change for one in passports}
        return "; ".join(sorted(texts - {""}))

    def storage(self) -> StoredWeight | None:
        """How the source stored the weight; None where bits changed, or the source left it out."""
        return describe_storage(self.name, self.sources) if self.sources and not self.change else None

    @property
    def block(self) -> int:
        """Inputs per scale of a whole row."""
        stored = self.storage()
        default = {"nvfp4": NVFP4_BLOCK, "fp8_block": FP8_BLOCK}.get(self.formats[0], 1)
        return default if stored is None else stored.block


class Group(NamedTuple):
    """Parameters that were cut from the same tensors, and the weights of these tensors: one, or one per expert."""

    leaves: tuple[Leaf, ...]
    weights: tuple[Weight, ...]


class Converted:
    """The checkpoint in `folder`, as its manifest describes it. Raises CheckpointError where there is none."""

    def __init__(self, folder: str | Path):
        self.folder = expand_path(folder).absolute()
        self.manifest = Manifest.read(self.folder)
        self.config = Config.from_dict(self.manifest.config, f"the config in {self.folder.name}'s manifest")
        self.arrays = Reader(self.folder, self.manifest.leaves)
        self.expected = self.arrays.entries
        self._scales: dict[Key, np.ndarray] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(entry.nbytes for entry in self.expected.values())

    @property
    def groups(self) -> list[Group]:
        """The parameters by the tensors they were cut from, in the order of the layout."""
        found: dict[tuple[str, ...], list[Leaf]] = {}
        for leaf in leaves(self.config):
            found.setdefault(leaf.sources, []).append(leaf)
        return [self._group(tuple(group)) for group in found.values()]

    def _group(self, group: tuple[Leaf, ...]) -> Group:
        entries = tuple(self.manifest.leaves[leaf.path] for leaf in group)
        sources: dict[str, list[SourceTensor]] = {}
        if entries[0].passport is not None:
            for source in entries[0].passport.sources:
                _require_tensor(source)
                sources.setdefault(_module_of(source.name), []).append(source)
        weights = (
            Weight(name, group, entries, expert, tuple(sources.get(_module_of(name), ())))
            for expert, name in enumerate(group[0].sources)
        )
        return Group(group, tuple(weights))

    def keys(self, group: Group) -> list[Key]:
        """The arrays that `group` is read from."""
        return [key for leaf in group.leaves for key in self._keys(leaf).values()]

    def _keys(self, leaf: Leaf) -> dict[str, Key]:
        """The keys of a parameter's components; a shared one has those of its original."""
        path = self.manifest.leaves[leaf.path].same_as or leaf.path
        return {name: (path, name) for name in self.manifest.leaves[path].arrays}

    def is_readable(self, group: Group) -> bool:
        """Whether all arrays of `group` exist with the recorded sizes."""
        return not self.arrays.find_problems(self.keys(group))

    def read(self, group: Group, on_damage: Callable[[DsvError], None]) -> Iterator[tuple[Weight, list[Components]]]:
        """Read each weight of `group`, with the components of its parameters (of its expert).

        `on_damage` is called for every array that cannot be read or does not match its SHA-256, at the latest after
        the last weight.
        """
        digests = {key: hashlib.sha256() for key in self.keys(group)}
        try:
            if group.leaves[0].stacked:
                experts = {name: self._read_experts(key, digests) for name, key in self._keys(group.leaves[0]).items()}
                for weight in group.weights:
                    yield weight, [{name: next(arrays) for name, arrays in experts.items()}]
            else:
                keys = [self._keys(leaf) for leaf in group.leaves]
                parts = [{name: self._read_whole(key, digests) for name, key in of_leaf.items()} for of_leaf in keys]
                yield group.weights[0], parts
        except (VerificationError, StorageError) as error:
            on_damage(error)
            return
        for key, digest in digests.items():
            if digest.hexdigest() != self.expected[key].sha256:
                on_damage(VerificationError(f"{self.arrays.where(key)} has changed"))

    def _read_experts(self, key: Key, digests) -> Iterator[np.ndarray]:
        for slab in self.arrays.slabs(key):
            digests[key].update(raw(slab))
            yield from slab

    def _read_whole(self, key: Key, digests) -> np.ndarray:
        array = self.arrays.read(key)
        digests[key].update(raw(array))
        return array

    def component(self, weight: Weight, name: str, leaf: int = 0) -> np.ndarray:
        """One component of a weight, from one of its parameters. Tensor scales are read once for all experts."""
        key = self._keys(weight.leaves[leaf])[name]
        stacked = weight.leaves[leaf].stacked
        if name != "tensor_scale":
            return self.arrays.read(key, weight.expert, weight.expert + 1) if stacked else self.arrays.read(key)
        if key not in self._scales:
            self._scales[key] = self.arrays.read(key)
        return self._scales[key][weight.expert : weight.expert + 1] if stacked else self._scales[key]

    def dtype(self, weight: Weight) -> str:
        """NumPy's name of the dtype of a dense weight."""
        return self.expected[self._keys(weight.leaves[0])["values"]].dtype


def _measure(source: SourceTensor) -> int:
    return math.prod(source.shape) * DTYPES[source.dtype].itemsize


def _require_tensor(source: SourceTensor) -> None:
    """Raise CheckpointError unless a recorded tensor can have been one: of a dtype that there is, bits of its size."""
    known = source.dtype in DTYPES and re.fullmatch("[0-9a-f]{64}", source.sha256)
    if known and source.bits:
        known = re.fullmatch("[0-9a-f]+", source.bits) and len(source.bits) == 2 * _measure(source)
    if not known:
        raise CheckpointError(f"a passport in the manifest has {tuple(source)!r:.200}, which is no tensor")


def describe_storage(name: str, sources: Sequence[SourceTensor]) -> StoredWeight:
    """How the weight `name` was stored, from its recorded tensors."""
    tensors = {}
    for source in sources:
        tensors[source.name] = Tensor(source.name, Path(), source.dtype, source.shape, 0, _measure(source))
    return detect(name, tensors)


def raise_damaged(problem: DsvError) -> None:
    """Raise an error of the same kind: for readers that must not use damaged arrays."""
    raise type(problem)(f"{problem}; nothing of it was used. `dsv32 verify` lists all damage")


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]
