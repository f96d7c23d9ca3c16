"""Single weights of a checkpoint in either layout, as they are stored, by the model's own paths. Nothing else is read.

A folder in Hugging Face layout is read by the table that the converter goes by, so a weight and what became of it have
the same path, shape and axes: `weight.error(other)` compares them.
"""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.arrays import Arrays, dtype_of, raw
from ..checkpoint.manifest import Manifest, is_converted
from ..config import Config
from ..errors import CapacityError, UsageError, VerificationError, listing, require
from ..layout import Leaf, leaves
from ..quantization.quantize import fp8_dequantize, nvfp4_dequantize
from ..system import host
from ..system.files import expand_path
from .converter import converter

SHARE = 0.8
"""Of the free memory, the share that may be read."""


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """One leaf, or one expert of it: `parts` are its components by name (manifest.COMPONENTS), `shape` the logical one
    with the axes `letters`."""

    path: str
    format: str
    letters: str
    shape: tuple[int, ...]
    parts: Mapping[str, np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of all components."""
        return sum(part.nbytes for part in self.parts.values())

    def values(self) -> np.ndarray:
        """What it stands for, float32 [*shape]."""
        if self.format == "nvfp4":
            return nvfp4_dequantize(*(self.parts[name] for name in ("codes", "block_scale", "tensor_scale")))
        if self.format == "fp8_block":
            return fp8_dequantize(self.parts["values"], self.parts["block_scale"])
        return self.parts["values"].astype(np.float32)

    def error(self, other: "StoredWeight") -> float:
        """||other - this|| / ||this||, in float64; 0 where both are zero, infinite where only this one is."""
        if self.shape != other.shape:
            raise UsageError(
                f"{self.path} is {list(self.shape)}, {other.path} is {list(other.shape)}: nothing compared"
            )
        mine = self.values().astype(np.float64)
        off, size = np.linalg.norm(other.values() - mine), np.linalg.norm(mine)
        return float(off / size) if size else (math.inf if off else 0.0)

    def __repr__(self) -> str:
        axes = ", ".join(f"{letter} {size}" for letter, size in zip(self.letters, self.shape, strict=True))
        return f"{self.path} [{axes}] {self.format}, {self.nbytes / 1e3:.1f} kB"


class Folder:
    """The weights of a checkpoint folder, converted or in Hugging Face layout, read one by one.

    Opening it reads manifest or headers only. Raises CheckpointError, ConfigError.
    """

    def __init__(self, folder: str | Path):
        self.folder = expand_path(folder).absolute()
        self.converted = is_converted(self.folder)
        self._read = _Converted(self.folder) if self.converted else _Source(self.folder)
        self.config: Config = self._read.config
        self.table: dict[str, Leaf] = {leaf.path: leaf for leaf in leaves(self.config)}

    def weight(self, path: str, expert: int | None = None) -> StoredWeight:
        """The leaf `path`, whole, or one expert of it. Raises UsageError where there is none, CapacityError where it
        does not fit in memory."""
        leaf = self._leaf(path)
        if expert is not None:
            if not leaf.stacked:
                raise UsageError(f"{path} has no experts; leave out expert={expert!r}")
            if isinstance(expert, bool) or not isinstance(expert, Integral) or not 0 <= expert < leaf.shape[0]:
                raise UsageError(f"expert must be a whole number from 0 to {leaf.shape[0] - 1}, not {expert!r}")
        self._require_room(path, self._read.nbytes(leaf) // (1 if expert is None else leaf.shape[0]))
        format, parts = self._read.parts(leaf, expert)
        if expert is None:
            return StoredWeight(path, format, leaf.letters, leaf.shape, parts)
        one = {name: part[0] for name, part in parts.items()}
        return StoredWeight(f"{path}[{expert}]", format, leaf.letters[1:], leaf.shape[1:], one)

    def layer(self, layer: int | str) -> dict[str, StoredWeight]:
        """Every leaf of a decoder layer by its path within, or of the drafting layer ("mtp")."""
        prefix = "mtp." if layer == "mtp" else f"layers.{layer}."
        found = [path for path in self.table if path.startswith(prefix)]
        if not found:
            raise UsageError(f"there is no layer {layer!r}: the model has {self.config.num_hidden_layers}, from 0")
        self._require_room(f"layer {layer}", sum(self._read.nbytes(self.table[path]) for path in found))
        return {path.removeprefix(prefix): self.weight(path) for path in found}

    def _leaf(self, path: str) -> Leaf:
        require(path, str, "a weight is called by its path, text")
        if path not in self.table:
            last = path.rpartition(".")[2]
            near = [known for known in self.table if last and known.endswith(last)] or list(self.table)
            raise UsageError(f"there is no weight {path!r}; there are for example {listing(near, 4)}")
        return self.table[path]

    def _require_room(self, what: str, nbytes: int) -> None:
        free = host.get_free_memory()
        if nbytes > free * SHARE:
            raise CapacityError(
                f"{what} takes {nbytes / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free; nothing was read. Read one "
                "expert, or one weight"
            )


class _Converted:
    """Reads a converted checkpoint."""

    def __init__(self, folder: Path):
        self.manifest = Manifest.read(folder)
        self.config = Config.from_dict(self.manifest.config, f"the config in {folder.name}'s manifest")
        self._arrays = Arrays(folder)

    def _entry(self, leaf: Leaf):
        home = self.manifest.leaves[leaf.path].same_as or leaf.path
        return home, self.manifest.leaves[home]

    def nbytes(self, leaf: Leaf) -> int:
        """Bytes of the whole leaf."""
        _, entry = self._entry(leaf)
        return sum(math.prod(array.shape) * dtype_of(array.dtype).itemsize for array in entry.arrays.values())

    def parts(self, leaf: Leaf, expert: int | None) -> tuple[str, dict[str, np.ndarray]]:
        """The components, compared with their SHA-256 where they are read whole. Raises VerificationError."""
        home, entry = self._entry(leaf)
        rows = (0, None) if expert is None else (expert, expert + 1)
        parts = {name: self._arrays.read((home, name), *rows) for name in entry.arrays}
        for name, part in parts.items() if expert is None else ():
            if hashlib.sha256(raw(part)).hexdigest() != entry.arrays[name].sha256:
                raise VerificationError(f"{home}.{name} has changed; `dsv32 verify` lists all damage")
        return entry.format, parts


class _Source:
    """Reads a folder in Hugging Face layout."""

    def __init__(self, folder: Path):
        self._source = converter("read.source").Source(folder)
        self.config = Config.from_dict(self._source.config, "config.json")

    def nbytes(self, leaf: Leaf) -> int:
        """Bytes of the tensors that the leaf is made of."""
        return sum(sum(tensor.nbytes for tensor in stored.tensors) for stored in self._stored(leaf))

    def _stored(self, leaf: Leaf) -> list[Any]:
        return [converter("read.weights").detect(name, self._source.tensors) for name in leaf.sources]

    def parts(self, leaf: Leaf, expert: int | None) -> tuple[str, dict[str, np.ndarray]]:
        """The components as a conversion would store them."""
        cut = converter("transform.cut")
        if expert is not None:
            leaf = leaf._replace(sources=leaf.sources[expert : expert + 1], shape=(1, *leaf.shape[1:]))
        stored = self._stored(leaf)
        form = cut.choose_format(leaf, stored)
        return form.format, cut.build(leaf, stored, form, self._source.read)
