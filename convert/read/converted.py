"""A converted checkpoint weight by weight: for each weight of the source, the components of the parameters it became.

Every array is hashed while it is read, so whoever uses the weights learns of damage. Memory: one group, or where
experts are stacked about `reader.SLAB_BYTES` of each component.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv32_jax.checkpoint.manifest import Manifest
from dsv32_jax.checkpoint.reader import Key, Reader, raw
from dsv32_jax.config import Config
from dsv32_jax.errors import DsvError, StorageError, VerificationError
from dsv32_jax.layout import Leaf, leaves
from dsv32_jax.quantization.quantize import FP8_BLOCK, NVFP4_BLOCK
from dsv32_jax.system.files import expand_path

from .provenance import Provenance, SourceTensor
from .safetensors import make_tensor
from .weights import StoredWeight, detect

Components = dict[str, np.ndarray]
"""The arrays of one parameter, or of one expert of it, by component (manifest.COMPONENTS)."""


class Weight(NamedTuple):
    """One weight of the source: the parameters it was cut into with the manifest's format of each, its expert, and its
    tensors. `change` says how the conversion changed its values, empty where every bit is kept."""

    name: str
    leaves: tuple[Leaf, ...]
    formats: tuple[str, ...]
    change: str
    expert: int
    sources: tuple[SourceTensor, ...]
    is_left_out: bool

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
        self._read_scale = functools.cache(self.arrays.read)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(entry.nbytes for entry in self.expected.values())

    @functools.cached_property
    def groups(self) -> list[Group]:
        """The parameters by the tensors they were cut from, in the order of the layout."""
        found: dict[tuple[str, ...], list[Leaf]] = {}
        for leaf in leaves(self.config):
            found.setdefault(leaf.sources, []).append(leaf)
        return [self._group(tuple(group)) for group in found.values()]

    def _group(self, group: tuple[Leaf, ...]) -> Group:
        entries = [self.manifest.leaves[leaf.path] for leaf in group]
        recorded = [Provenance.of(entry) for entry in entries]
        changes = {"its source is not recorded" if one is None else one.change for one in recorded} - {""}
        sources: dict[str, list[SourceTensor]] = {}
        for source in recorded[0].sources if recorded[0] is not None else ():
            sources.setdefault(source.name.rpartition(".")[0], []).append(source)
        is_left_out = entries[0].same_as is not None and recorded[0] is not None and not sources
        formats, change = tuple(entry.format for entry in entries), "; ".join(sorted(changes))
        weights = (
            Weight(name, group, formats, change, expert, tuple(sources.get(name.rpartition(".")[0], ())), is_left_out)
            for expert, name in enumerate(group[0].sources)
        )
        return Group(group, tuple(weights))

    def keys(self, group: Group) -> list[Key]:
        """The arrays that `group` is read from."""
        return [key for leaf in group.leaves for key in self._keys(leaf).values()]

    def count_bytes(self, group: Group) -> int:
        """Bytes of the arrays that `group` is read from."""
        return sum(self.expected[key].nbytes for key in self.keys(group))

    def _keys(self, leaf: Leaf) -> dict[str, Key]:
        """The keys of a parameter's components; a shared one has those of its original."""
        path = self.manifest.leaves[leaf.path].same_as or leaf.path
        return {name: (path, name) for name in self.manifest.leaves[path].arrays}

    def read(self, group: Group, on_damage: Callable[[DsvError], None]) -> Iterator[tuple[Weight, list[Components]]]:
        """Read each weight of `group`, with the components of its parameters (of its expert).

        `on_damage` is called for every array that cannot be read or does not match its SHA-256, at the latest after
        the last weight.
        """
        digests = {key: hashlib.sha256() for key in self.keys(group)}
        try:
            parts = [
                {name: self._read_weights(leaf, key, digests) for name, key in self._keys(leaf).items()}
                for leaf in group.leaves
            ]
            for weight in group.weights:
                yield weight, [{name: next(arrays) for name, arrays in part.items()} for part in parts]
        except (VerificationError, StorageError) as error:
            on_damage(error)
            return
        for key, digest in digests.items():
            if digest.hexdigest() != self.expected[key].sha256:
                on_damage(VerificationError(f"{self.arrays.where(key)} has changed"))

    def _read_weights(self, leaf: Leaf, key: Key, digests: dict[Key, Any]) -> Iterator[np.ndarray]:
        """Yield the array of each expert, or the only one."""
        for array in self.arrays.slabs(key) if leaf.stacked else [self.arrays.read(key)]:
            digests[key].update(raw(array))
            yield from array if leaf.stacked else [array]

    def component(self, weight: Weight, name: str, leaf: int = 0) -> np.ndarray:
        """One component of a weight, from one of its parameters. Tensor scales are read once for all experts."""
        key = self._keys(weight.leaves[leaf])[name]
        stacked = weight.leaves[leaf].stacked
        if name == "tensor_scale":
            return self._read_scale(key)[weight.expert : weight.expert + 1] if stacked else self._read_scale(key)
        return self.arrays.read(key, weight.expert, weight.expert + 1) if stacked else self.arrays.read(key)

    def dtype(self, weight: Weight) -> str:
        """NumPy's name of the dtype of a dense weight."""
        return self.expected[self._keys(weight.leaves[0])["values"]].dtype


def describe_storage(name: str, sources: Sequence[SourceTensor]) -> StoredWeight:
    """How the weight `name` was stored, from its recorded tensors."""
    return detect(name, {s.name: make_tensor(s.name, s.dtype, s.shape) for s in sources})


def raise_damaged(problem: DsvError) -> None:
    """Raise an error of the same kind: for readers that must not use damaged arrays."""
    raise type(problem)(f"{problem}; nothing of it was used. `dsv32 verify` lists all damage")
