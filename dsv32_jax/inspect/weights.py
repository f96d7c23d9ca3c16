"""Single weights of a checkpoint in either layout: stored components, values, errors.

Weights are named by the model's parameter paths, and nothing else is read. A folder in Hugging Face layout is read with
the converter's tables, so a weight and its converted counterpart have the same path, shape and axes.
"""

import dataclasses
import hashlib
import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.manifest import LeafEntry, Manifest, is_converted
from ..checkpoint.reader import Reader, raw
from ..config import Config
from ..errors import CapacityError, UsageError, VerificationError, listing, require, require_integer
from ..layout import Leaf, leaves
from ..quantization.quantize import fp8_dequantize, nvfp4_dequantize
from ..system import host
from ..system.files import expand_path
from ..system.progress import format_size

SHARE = 0.8
"""The share of free memory that may be read."""


def converter(module: str) -> Any:
    """Import a module of the converter, which is a subpackage only where this package is installed."""
    return importlib.import_module(f"dsv32_jax.convert.{module}")


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """A weight, or one expert of it: `parts` are its stored components by name (manifest.COMPONENTS), `shape` is the
    logical shape with the axes `letters`."""

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
        """Return the dequantized weight, float32 [*shape]."""
        if self.format == "nvfp4":
            return nvfp4_dequantize(*(self.parts[name] for name in ("codes", "block_scale", "tensor_scale")))
        if self.format == "fp8_block":
            return fp8_dequantize(self.parts["values"], self.parts["block_scale"])
        return self.parts["values"].astype(np.float32)

    def error(self, other: "StoredWeight") -> float:
        """Return ||other - self|| / ||self|| in float64: 0 if both are zero, infinity if only this weight is."""
        require_one_shape(self, other)
        values = self.values().astype(np.float64)
        error, size = np.linalg.norm(other.values() - values), np.linalg.norm(values)
        return float(error / size) if size else (math.inf if error else 0.0)

    def __repr__(self) -> str:
        axes = ", ".join(f"{letter} {size}" for letter, size in zip(self.letters, self.shape, strict=True))
        return f"{self.path} [{axes}] {self.format}, {format_size(self.nbytes)}"


class Folder:
    """The weights of a checkpoint folder, converted or in Hugging Face layout, read one at a time.

    Opening it reads the manifest or the headers only. Raises CheckpointError, ConfigError.
    """

    def __init__(self, folder: str | Path):
        self.folder = expand_path(folder).absolute()
        self.converted = is_converted(self.folder)
        self._reader = _ConvertedReader(self.folder) if self.converted else _SourceReader(self.folder)
        self.config: Config = self._reader.config
        self.table: dict[str, Leaf] = {leaf.path: leaf for leaf in leaves(self.config)}

    def __repr__(self) -> str:
        layout = "converted" if self.converted else "Hugging Face layout"
        return f"Folder {self.folder} ({layout}): {len(self.table)} weights"

    def weight(self, path: str, expert: int | None = None) -> StoredWeight:
        """Read the weight `path`, or one expert of it. Raises UsageError if there is none, CapacityError if it does
        not fit in memory."""
        leaf = self._find(path)
        if expert is not None:
            if not leaf.stacked:
                raise UsageError(f"{path} has no experts; leave out expert={expert!r}")
            expert = require_integer("expert", expert, 0, leaf.shape[0] - 1)
        self._require_room(path, self._reader.nbytes(leaf) // (1 if expert is None else leaf.shape[0]))
        format, parts = self._reader.read(leaf, expert)
        if expert is None:
            return StoredWeight(path, format, leaf.letters, leaf.shape, parts)
        parts = {name: part[0] for name, part in parts.items()}
        return StoredWeight(f"{path}[{expert}]", format, leaf.letters[1:], leaf.shape[1:], parts)

    def layer(self, layer: int | str) -> dict[str, StoredWeight]:
        """Read all weights of a decoder layer, or of the MTP head ("mtp"), by their path within the layer."""
        prefix = "mtp." if layer == "mtp" else f"layers.{layer}."
        paths = [path for path in self.table if path.startswith(prefix)]
        if not paths:
            raise UsageError(f"there is no layer {layer!r}; layers are 0 to {self.config.num_hidden_layers - 1}")
        self._require_room(f"layer {layer}", sum(self._reader.nbytes(self.table[path]) for path in paths))
        return {path.removeprefix(prefix): self.weight(path) for path in paths}

    def _find(self, path: str) -> Leaf:
        require(path, str, "a weight is named by its path, a string")
        if path not in self.table:
            last = path.rpartition(".")[2]
            similar = [known for known in self.table if last and known.endswith(last)] or list(self.table)
            raise UsageError(f"there is no weight {path!r}; weights are for example {listing(similar, 4)}")
        return self.table[path]

    def _require_room(self, what: str, nbytes: int) -> None:
        free = host.get_free_memory()
        if nbytes > free * SHARE:
            raise CapacityError(
                f"{what} takes {format_size(nbytes)}, but {format_size(free)} are free; nothing was read. Read single "
                "weights or experts"
            )


class _ConvertedReader:
    def __init__(self, folder: Path):
        self._manifest = Manifest.read(folder)
        self.config = Config.from_dict(self._manifest.config, f"the config in {folder.name}'s manifest")
        self._reader = Reader(folder, self._manifest.leaves)

    def _entry(self, leaf: Leaf) -> tuple[str, LeafEntry]:
        home = self._manifest.leaves[leaf.path].same_as or leaf.path
        return home, self._manifest.leaves[home]

    def nbytes(self, leaf: Leaf) -> int:
        _, entry = self._entry(leaf)
        return sum(array.nbytes for array in entry.arrays.values())

    def read(self, leaf: Leaf, expert: int | None) -> tuple[str, dict[str, np.ndarray]]:
        """Return format and components; SHA-256 is checked if they are read whole. Raises VerificationError."""
        home, entry = self._entry(leaf)
        rows = (0, None) if expert is None else (expert, expert + 1)
        parts = {name: self._reader.read((home, name), *rows) for name in entry.arrays}
        for name, part in parts.items() if expert is None else ():
            if hashlib.sha256(raw(part)).hexdigest() != entry.arrays[name].sha256:
                raise VerificationError(f"{home}.{name} is damaged; `dsv32 verify` lists all damage")
        return entry.format, parts


class _SourceReader:
    def __init__(self, folder: Path):
        self._source = converter("read.source").Source(folder)
        self.config = Config.from_dict(self._source.config, "config.json")

    def _detect(self, leaf: Leaf) -> list[Any]:
        return [converter("read.weights").detect(name, self._source.tensors) for name in leaf.sources]

    def nbytes(self, leaf: Leaf) -> int:
        return sum(sum(tensor.nbytes for tensor in stored.tensors) for stored in self._detect(leaf))

    def read(self, leaf: Leaf, expert: int | None) -> tuple[str, dict[str, np.ndarray]]:
        """Return format and components as a conversion would store them."""
        cut = converter("transform.cut")
        if expert is not None:
            leaf = leaf._replace(sources=leaf.sources[expert : expert + 1], shape=(1, *leaf.shape[1:]))
        stored = self._detect(leaf)
        form = cut.choose_format(leaf, stored)
        return form.format, cut.build(leaf, stored, form, self._source.read)


def require_one_shape(a: StoredWeight, b: StoredWeight) -> None:
    """Raise UsageError unless the weights have one shape."""
    if a.shape != b.shape:
        raise UsageError(f"{a.path} is {list(a.shape)}, {b.path} is {list(b.shape)}: shapes must be equal")
