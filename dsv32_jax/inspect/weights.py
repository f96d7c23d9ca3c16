"""Single weights of a checkpoint in either layout: stored components, values, errors, and statistics of NVFP4 blocks.

Weights are named by the model's parameter paths, and nothing else is read. A folder in Hugging Face layout is read with
the converter's tables, so a weight and its converted counterpart have the same path, shape and axes.
"""

import dataclasses
import hashlib
import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.manifest import LeafEntry, Manifest, is_converted
from ..checkpoint.reader import Reader, raw
from ..config import Config
from ..errors import CapacityError, UsageError, VerificationError, listing, require, require_integer
from ..layout import Leaf, leaves
from ..quantization.quantize import E2M1_MAX, E4M3_AS_SCALE, fp8_dequantize, nvfp4_dequantize
from ..system import host
from ..system.files import expand_path
from ..system.progress import format_size

SHARE = 0.8
"""The share of free memory that may be read."""

LARGEST_SCALE = 0x7E
"""The byte of 448, the largest E4M3. The byte above it is NaN and counts as 448."""


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
        _require_one_shape(self, other)
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


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Counts over the blocks of an NVFP4 weight.

    codes             occurrences of each of the 16 codes (formats.NVFP4: code 0 is 0, 7 is 6, 8..15 are negative)
    scales            occurrences of each of the 256 bytes as a block scale
    blocks            all blocks
    zero_blocks       blocks whose scale or whose codes are all zero
    saturated_blocks  blocks with the largest scale, 448, which may have needed a larger one
    """

    codes: np.ndarray
    scales: np.ndarray
    blocks: int
    zero_blocks: int
    saturated_blocks: int


def statistics(weight: StoredWeight) -> Statistics:
    """Return the statistics of an NVFP4 weight. Raises UsageError for another format."""
    tensors = converter("inspect.tensors")
    codes, scale = _blocks(weight)
    magnitude = scale & 0x7F
    no_codes = ~(codes & 0x77).any(axis=-1)
    return Statistics(
        tensors.count_nibbles(tensors.count_bytes(codes)),
        tensors.count_bytes(scale),
        scale.size,
        int(np.count_nonzero(no_codes | (magnitude == 0))),
        int(np.count_nonzero(magnitude >= LARGEST_SCALE)),
    )


def count_clipped(weight: StoredWeight, source: StoredWeight) -> int:
    """Count the elements of `source` that exceed the largest value of their block in the NVFP4 `weight`."""
    codes, scale = _blocks(weight)
    require(source, StoredWeight, "source must be a weight, as Folder.weight returns it")
    _require_one_shape(source, weight)
    largest = E4M3_AS_SCALE[scale].reshape(weight.parts["block_scale"].shape) * weight.parts["tensor_scale"] * E2M1_MAX
    limit = np.repeat(largest, 2 * codes.shape[-1], axis=-1)
    return int(np.count_nonzero(np.abs(source.values()) > limit))


def _require_one_shape(a: StoredWeight, b: StoredWeight) -> None:
    if a.shape != b.shape:
        raise UsageError(f"{a.path} is {list(a.shape)}, {b.path} is {list(b.shape)}: shapes must be equal")


def _blocks(weight: StoredWeight) -> tuple[np.ndarray, np.ndarray]:
    """Return the packed codes of each block [n, bytes] and the byte of its scale [n]."""
    require(weight, StoredWeight, "weight must be a weight, as Folder.weight returns it")
    if weight.format != "nvfp4":
        raise UsageError(f"{weight.path} is {weight.format}; only NVFP4 has codes and block scales")
    scale = np.ascontiguousarray(weight.parts["block_scale"]).view(np.uint8).reshape(-1)
    return weight.parts["codes"].reshape(scale.size, -1), scale


def expert_errors(folder: Folder, source: Folder, layers: Sequence[int] | None = None) -> np.ndarray:
    """Return the error ||e|| / ||w|| of every routed expert's three matrices, `folder` against `source`, as an array
    [layers, experts]. `layers` defaults to all layers with experts; one expert of each folder is in memory."""
    for one in (folder, source):
        require(one, Folder, "expert_errors compares two inspect.Folder")
    cfg = source.config
    with_experts = range(cfg.first_k_dense_replace, cfg.num_hidden_layers)
    layers = with_experts if layers is None else layers
    require(layers, Sequence, "layers must be a list of layers")
    if wrong := [layer for layer in layers if layer not in with_experts]:
        raise UsageError(f"no routed experts in layers {listing(wrong)}; {with_experts[0]} to {with_experts[-1]} have")
    errors = np.zeros((len(layers), cfg.n_routed_experts))
    for i, layer in enumerate(layers):
        banks = [path for path, leaf in source.table.items() if leaf.stacked and path.startswith(f"layers.{layer}.")]
        for expert in range(cfg.n_routed_experts):
            error = size = 0.0
            for path in banks:
                a, b = (one.weight(path, expert).values().astype(np.float64) for one in (source, folder))
                error, size = error + float(np.sum((b - a) ** 2)), size + float(np.sum(a**2))
            errors[i, expert] = np.sqrt(error / size) if size else 0.0
    return errors
