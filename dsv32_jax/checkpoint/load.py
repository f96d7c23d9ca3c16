"""From a converted checkpoint to a Model: leaf by leaf, straight to where each leaf belongs."""

import dataclasses
import math
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..config import Config
from ..errors import CheckpointError, UsageError, VerificationError, listing
from ..kernels import variable
from ..layout import Leaf, leaves
from ..model.model import Model, Origin, build
from ..parallel import sharding
from ..quantization.formats import NVFP4, Fp8Block, Weight, dequantize
from ..system.compilation import initialize
from ..system.files import expand_path
from . import checksums, vocabulary
from .arrays import Key
from .manifest import LeafEntry, Manifest
from .store import Reader

LEVELS = (None, "quick", "full")
FORMATS = {"nvfp4": NVFP4, "fp8_block": Fp8Block}

GROUP_BYTES = 64 << 20
"""Small leaves are read together: a read costs tens of milliseconds whatever its size."""

ABSORBED = ("w_uk_HNC", "w_uv_HPC")
"""W^UK and W^UV are used by rows as well as by columns: they are dequantized once, here, to the compute dtype."""


def load(folder: str | Path, *, mesh: Mesh | None = None, dtype=jnp.bfloat16, verify: str | None = None) -> Model:
    """The model in a folder that `dsv32 convert` wrote.

    `dtype` is the compute dtype, bfloat16 or float32; weights stay in the formats they are stored in. With a `mesh`
    (axes among data, model, expert) each device reads its own part. At most the model and one leaf (or
    64 MiB of small ones) are in memory.
    `verify`: "quick" compares the files with the manifest before anything is loaded, "full" also the SHA-256 of every
    array that was loaded; None trusts the disk.
    Raises CheckpointError where the folder does not hold a finished conversion of the model its config describes, or
    a tokenizer.json with other token ids; VerificationError that names what is damaged.
    """
    initialize()
    variable.asked()
    if (compute := _dtype(dtype)) not in ("bfloat16", "float32"):
        raise UsageError(f"dtype must be bfloat16 or float32, not {compute}; weights keep their own formats")
    if verify not in LEVELS:
        raise UsageError(f"verify must be one of {listing(LEVELS)}, not {verify!r}")
    stored = Checkpoint.open(folder, verify)
    origin = Origin(stored.manifest.digest, vocabulary.check(stored.folder, stored.cfg))
    if mesh is not None:
        sharding.check(mesh, stored.shapes())
    found: dict[str, Weight] = {}
    for group in _groups(stored.manifest.leaves):
        found |= stored.weights(group, dtype, mesh, verify)
    return build(stored.cfg, dtype, lambda path: found[stored.home(path)], origin, mesh)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A converted checkpoint whose manifest holds the leaves of its config; they are read as they are asked for."""

    folder: Path
    manifest: Manifest
    cfg: Config
    table: dict[str, Leaf]

    @classmethod
    def open(cls, folder: str | Path, verify: str | None = None) -> "Checkpoint":
        """Read the manifest only, and with `verify` compare the files with it. Raises as `load` does."""
        folder = expand_path(folder).resolve()
        manifest = Manifest.read(folder)
        if verify is not None:
            checksums.require_files(folder, manifest)
        checksums.require_weights(folder, manifest)
        cfg = Config.from_dict(manifest.config, f"the config in {folder.name}'s manifest")
        table = {leaf.path: leaf for leaf in leaves(cfg)}
        _compare(folder, table, manifest.leaves)
        return cls(folder, manifest, cfg, table)

    @cached_property
    def reader(self) -> Reader:
        """What reads its arrays."""
        return Reader(self.folder)

    def home(self, path: str) -> str:
        """The leaf that holds the arrays of `path`: the same one, or the one it is a copy of."""
        return self.manifest.leaves[path].same_as or path

    def shapes(self) -> list[tuple[Leaf, tuple[int, ...]]]:
        """Every stored array: its leaf and its shape."""
        entries = self.manifest.leaves.items()
        return [(self.table[path], array.shape) for path, entry in entries for array in entry.arrays.values()]

    def weights(
        self, paths: Collection[str], dtype, mesh: Mesh | None = None, verify: str | None = None
    ) -> dict[str, Weight]:
        """The weights of `paths`, none of which is a copy of another leaf, for a model that computes in `dtype`."""
        entries = {path: self.manifest.leaves[path] for path in paths}
        try:
            arrays = _read(self.reader, entries, self.table, mesh)
        except CheckpointError as error:
            if verify is None:
                raise
            raise VerificationError(f"{error}; nothing was loaded. Copy the folder again, or convert again") from error
        if verify == "full":
            checksums.require_arrays(self.folder, entries, arrays)
        return _weights(entries, arrays, dtype)


def _dtype(dtype) -> str:
    """The name of `dtype`, as it was written where there is no such dtype."""
    try:
        return np.dtype(dtype).name
    except TypeError:
        return repr(dtype)


def _groups(entries: dict[str, LeafEntry]) -> Iterator[list[str]]:
    """The stored leaves in runs of at most GROUP_BYTES; a larger leaf alone."""
    group: list[str] = []
    size = 0
    for path, entry in entries.items():
        nbytes = sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in entry.arrays.values())
        if group and size + nbytes > GROUP_BYTES:
            yield group
            group, size = [], 0
        if entry.same_as is None:
            group.append(path)
            size += nbytes
    yield group


def _read(reader: Reader, entries: dict[str, LeafEntry], table: dict[str, Leaf], mesh: Mesh | None):
    """The arrays of `entries`, each component in the sharding that its leaf's letters give it."""
    targets = {
        (path, name): jax.ShapeDtypeStruct(
            array.shape, np.dtype(array.dtype), sharding=mesh and sharding.of_leaf(mesh, table[path], array.shape)
        )
        for path, entry in entries.items()
        for name, array in entry.arrays.items()
    }
    return reader.read(targets)


def _weights(entries: dict[str, LeafEntry], arrays: dict[Key, jax.Array], dtype) -> dict[str, Weight]:
    """The weights that `arrays` are the components of."""
    weights: dict[str, Weight] = {}
    for path, entry in entries.items():
        parts = {name: arrays.pop((path, name)) for name in entry.arrays}
        weight = FORMATS[entry.format](**parts) if entry.format in FORMATS else parts["values"]
        weights[path] = dequantize(weight, dtype) if path.endswith(ABSORBED) else weight
    return weights


def _compare(folder: Path, table: dict[str, Leaf], entries: dict[str, LeafEntry]) -> None:
    """The manifest holds exactly the leaves of the config, each of the right logical shape."""
    problems = []
    if missing := sorted(set(table) - set(entries)):
        problems.append(f"missing ({len(missing)}): {listing(missing)}")
    if unknown := sorted(set(entries) - set(table)):
        problems.append(f"unknown ({len(unknown)}): {listing(unknown)}")
    wrong = []
    for path in sorted(set(table) & set(entries)):
        entry = entries[path]
        shape = entry.same_as is None and _logical_shape(entry)
        if shape and shape != table[path].shape:
            wrong.append(f"{path} is {shape}, not {table[path].shape}")
    if wrong:
        problems.append(f"of another shape ({len(wrong)}): {listing(wrong)}")
    if problems:
        raise CheckpointError(
            f"{folder} does not hold the leaves its config describes; nothing was read.\n  " + "\n  ".join(problems)
        )


def _logical_shape(entry: LeafEntry) -> tuple[int, ...]:
    if entry.format == "nvfp4":
        *out, packed = entry.arrays["codes"].shape
        return (*out, 2 * packed)
    return tuple(entry.arrays["values"].shape)
