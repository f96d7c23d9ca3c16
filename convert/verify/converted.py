"""A converted checkpoint read back weight by weight: for each one of the source, the components of its leaves.

Every array that is read is hashed on the way, so whoever uses the weights learns of damage. Memory: one group, or where
experts are stacked about `arrays.SLAB_BYTES` of each component.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsv32_jax.checkpoint.arrays import FOLDER, Arrays, Key, raw
from dsv32_jax.checkpoint.manifest import ArrayEntry, LeafEntry, Manifest
from dsv32_jax.checkpoint.provenance import SourceTensor
from dsv32_jax.config import Config
from dsv32_jax.errors import StorageError, VerificationError
from dsv32_jax.layout import Leaf, leaves
from dsv32_jax.system.files import expand_path

from ..read.safetensors import NUMPY_DTYPES


class Weight(NamedTuple):
    """One weight of the source: its name, the leaves it was cut into, its expert, its tensors (none if left out)."""

    name: str
    leaves: tuple[Leaf, ...]
    entries: tuple[LeafEntry, ...]
    expert: int
    sources: tuple[SourceTensor, ...]

    @property
    def change(self) -> str:
        """What the conversion did to its values, empty where every bit is kept."""
        texts = {entry.passport.change for entry in self.entries if entry.passport is not None}
        return "; ".join(sorted(texts - {""}))


class Group(NamedTuple):
    """Leaves that were cut from the same tensors, and the weights that these tensors are: one, or one an expert."""

    leaves: tuple[Leaf, ...]
    weights: tuple[Weight, ...]


class Converted:
    """The folder `folder`, as its manifest describes it. Raises CheckpointError where it holds nothing of the kind."""

    def __init__(self, folder: str | Path):
        self.folder = expand_path(folder).absolute()
        self.manifest = Manifest.read(self.folder)
        self.config = Config.from_dict(self.manifest.config, f"the config in {self.folder.name}'s manifest")
        self.arrays = Arrays(self.folder)
        self._scales: dict[Key, np.ndarray] = {}
        self.expected: dict[Key, ArrayEntry] = {
            (path, name): array for path, leaf in self.manifest.leaves.items() for name, array in leaf.arrays.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(nbytes_of(array) for array in self.expected.values())

    @property
    def groups(self) -> list[Group]:
        """The leaves by the tensors they were cut from, in the order of the layout."""
        found: dict[tuple[str, ...], list[Leaf]] = {}
        for leaf in leaves(self.config):
            found.setdefault(leaf.sources, []).append(leaf)
        return [self._group(tuple(group)) for group in found.values()]

    def damaged_arrays(self) -> list[str]:
        """Arrays that are missing or not of the recorded dtype and shape; reads no data."""
        found = self.arrays.stored
        problems = [f"{FOLDER}/{part} cannot be read: {why}" for part, why in sorted(self.arrays.problems.items())]
        for key, entry in self.expected.items():
            if key not in found:
                problems.append(f"{'.'.join(key)} is missing")
            elif (found[key].dtype, found[key].shape) != (entry.dtype, entry.shape):
                is_now = f"{found[key].dtype} {list(found[key].shape)}"
                problems.append(f"{self.where(key)} is {is_now} instead of {entry.dtype} {list(entry.shape)}")
        surplus = sorted(set(found) - set(self.expected))
        return problems + [f"{self.where(key)} is not in the manifest" for key in surplus]

    def keys(self, group: Group) -> list[Key]:
        """The arrays that `group` is read from."""
        return [key for leaf in group.leaves for key in self._keys(leaf).values()]

    def readable(self, group: Group) -> bool:
        """Whether all arrays of `group` are there, with the recorded dtypes and shapes."""
        found = ((self.arrays.stored.get(key), self.expected[key]) for key in self.keys(group))
        return all(info is not None and (info.dtype, info.shape) == (e.dtype, e.shape) for info, e in found)

    def where(self, key: Key) -> str:
        """The array and the folder it lies in, for messages."""
        return f"{'.'.join(key)} ({FOLDER}/{self.arrays.stored[key].part})"

    def read(
        self, group: Group, damaged: Callable[[str], None]
    ) -> Iterator[tuple[Weight, list[dict[str, np.ndarray]]]]:
        """Each weight of `group` with the components of its leaves (of its expert); `damaged` is told of every array
        that does not have its SHA-256 or cannot be read, at the latest after the last weight."""
        keys = {leaf.path: self._keys(leaf) for leaf in group.leaves}
        hashes = {key: hashlib.sha256() for of_leaf in keys.values() for key in of_leaf.values()}
        try:
            if group.leaves[0].stacked:
                yield from self._experts(group, keys[group.leaves[0].path], hashes)
            else:
                parts = [
                    {
                        name: self._hashed(key, hashes, 0, self.expected[key].shape[0])
                        for name, key in keys[path].items()
                    }
                    for path in keys
                ]
                yield group.weights[0], parts
        except StorageError as error:
            damaged(str(error))
            return
        for key, found in hashes.items():
            if found.hexdigest() != self.expected[key].sha256:
                damaged(f"{self.where(key)} has changed")

    def component(self, weight: Weight, name: str, leaf: int = 0) -> np.ndarray:
        """One component of one weight alone, from one of its leaves. Tensor scales are read once for all experts."""
        key = self._keys(weight.leaves[leaf])[name]
        stacked = weight.leaves[leaf].stacked
        if name != "tensor_scale":
            return self.arrays.read(key, weight.expert, weight.expert + 1) if stacked else self.arrays.read(key)
        if key not in self._scales:
            self._scales[key] = self.arrays.read(key)
        return self._scales[key][weight.expert : weight.expert + 1] if stacked else self._scales[key]

    def formats(self, weight: Weight) -> tuple[str, ...]:
        """The manifest's format of each leaf of `weight`."""
        return tuple(entry.format for entry in weight.entries)

    def dtype(self, weight: Weight) -> str:
        """NumPy's name of the dtype of the values of a dense weight."""
        return self.expected[self._keys(weight.leaves[0])["values"]].dtype

    def hash(self, key: Key, damaged: Callable[[str], None]) -> None:
        """Read one array slab by slab; `damaged` is told when it does not have its SHA-256."""
        found = hashlib.sha256()
        try:
            for _, rows in self.arrays.slabs(key):
                found.update(raw(rows))
        except StorageError as error:
            damaged(str(error))
            return
        if found.hexdigest() != self.expected[key].sha256:
            damaged(f"{self.where(key)} has changed")

    def _group(self, group: tuple[Leaf, ...]) -> Group:
        entries = tuple(self.manifest.leaves[leaf.path] for leaf in group)
        sources: dict[str, list[SourceTensor]] = {}
        if entries[0].passport is not None:
            for source in entries[0].passport.sources:
                sources.setdefault(_module(source.name), []).append(source)
        weights = (
            Weight(name, group, entries, expert, tuple(sources.get(_module(name), ())))
            for expert, name in enumerate(group[0].sources)
        )
        return Group(group, tuple(weights))

    def _keys(self, leaf: Leaf) -> dict[str, Key]:
        """The keys of the leaf's components: a shared leaf has those of its original."""
        path = self.manifest.leaves[leaf.path].same_as or leaf.path
        return {name: (path, name) for name in self.manifest.leaves[path].arrays}

    def _experts(self, group: Group, keys: dict[str, Key], hashes) -> Iterator[tuple[Weight, list[dict]]]:
        """The weights of a stacked leaf. Each component is read in slabs of its own: whole chunks, each once."""
        slabs = {name: self._hashed_rows(key, hashes) for name, key in keys.items()}
        for weight in group.weights:
            yield weight, [{name: next(rows) for name, rows in slabs.items()}]

    def _hashed_rows(self, key: Key, hashes) -> Iterator[np.ndarray]:
        """The array expert by expert."""
        for _, slab in self.arrays.slabs(key):
            hashes[key].update(raw(slab))
            yield from slab

    def _hashed(self, key: Key, hashes, start: int, stop: int) -> np.ndarray:
        array = self.arrays.read(key, start, stop)
        hashes[key].update(raw(array))
        return array


def raise_damaged(message: str) -> None:
    """For readers who must not go on with damaged arrays."""
    raise VerificationError(f"{message}. Nothing is used of it; `dsv32 verify` lists all damage")


def _module(name: str) -> str:
    """What the names of a weight and of everything that belongs to it begin with."""
    return name.rpartition(".")[0]


def nbytes_of(entry: ArrayEntry) -> int:
    """Bytes of one array."""
    return math.prod(entry.shape) * NUMPY_DTYPES[entry.dtype].itemsize
