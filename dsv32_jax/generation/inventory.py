"""The leaves of a model as they are stored: of a converted checkpoint by its manifest, of a config.json by a format."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..checkpoint.arrays import dtype_of
from ..checkpoint.load import ABSORBED
from ..checkpoint.manifest import ArrayEntry, LeafEntry, Manifest
from ..checkpoint.random_weights import UNQUANTIZED
from ..config import Config
from ..errors import CheckpointError, UsageError, listing
from ..layout import COPIES, Leaf, leaves
from ..parallel import partition
from ..quantization.quantize import FP8_BLOCK, NVFP4_BLOCK
from ..system.files import expand_path

FORMATS = ("nvfp4", "fp8", "bf16")
"""nvfp4: as NVIDIA publishes it, that is experts, dense feed-forward and W^O in NVFP4, the rest of attention, the
indexer and the drafting layer in bfloat16. fp8: the linears that DeepSeek publishes in FP8. bf16: every matrix."""


class Inventory(NamedTuple):
    """A model's config, its leaves by path, and what the manifest or the format says of each."""

    cfg: Config
    table: Mapping[str, Leaf]
    entries: Mapping[str, LeafEntry]

    @property
    def parameters(self) -> int:
        """Weights, each counted once."""
        return sum(math.prod(self.table[path].shape) for path, entry in self.entries.items() if entry.same_as is None)

    def device_bytes(self, mesh: partition.Mesh, dtype) -> tuple[int, int]:
        """Bytes that one device of `mesh` holds of a loaded model: as stored, and of the matrices that `load`
        dequantizes to the compute dtype `dtype`. Raises CapacityError where the mesh does not divide the leaves."""
        own = [(self.table[path], entry) for path, entry in self.entries.items() if entry.same_as is None]
        partition.check(mesh, [(leaf, array.shape) for leaf, entry in own for array in entry.arrays.values()])
        stored = dequantized = 0
        for leaf, entry in own:
            if leaf.path.endswith(ABSORBED):
                dequantized += math.prod(partition.split(mesh, leaf, leaf.shape)) * dtype_of(dtype).itemsize
            else:
                sizes = (
                    (partition.split(mesh, leaf, a.shape), dtype_of(a.dtype).itemsize) for a in entry.arrays.values()
                )
                stored += sum(math.prod(shape) * itemsize for shape, itemsize in sizes)
        return stored, dequantized


def read(path: str | Path, format: str | None = None) -> Inventory:
    """The inventory of a converted checkpoint, or of the config.json `path` with its matrices in `format` ("nvfp4").

    Raises UsageError, ConfigError, CheckpointError.
    """
    path = expand_path(path)
    if path.is_file():
        if format not in (None, *FORMATS):
            raise UsageError(f"the format is one of {listing(FORMATS)}, not {format!r}; nothing was read")
        cfg = Config.from_json(path)
        return _inventory(path, cfg, {leaf.path: _entry(leaf, format or FORMATS[0]) for leaf in leaves(cfg)})
    if format is not None:
        raise UsageError(f"a format is for a config.json; what {path} holds is in the formats of its manifest")
    manifest = Manifest.read(path)
    return _inventory(path, Config.from_dict(manifest.config, f"the config in {path.name}'s manifest"), manifest.leaves)


def _inventory(path: Path, cfg: Config, entries: Mapping[str, LeafEntry]) -> Inventory:
    table = {leaf.path: leaf for leaf in leaves(cfg)}
    if differing := sorted(set(table) ^ set(entries)):
        raise CheckpointError(f"{path} does not hold the leaves its config describes: {listing(differing)}")
    return Inventory(cfg, table, entries)


def _entry(leaf: Leaf, format: str) -> LeafEntry:
    """What a checkpoint in `format` says of `leaf`, without digests."""
    *out, size = leaf.shape
    if leaf.path in COPIES:
        return LeafEntry("dense", {}, COPIES[leaf.path])
    if len(leaf.source_shape) == 1:
        return LeafEntry("dense", {"values": ArrayEntry("float32", leaf.shape, "")})
    if format == "bf16" or _name(leaf) in UNQUANTIZED or (format == "nvfp4" and _kept_by_nvidia(leaf)):
        return LeafEntry("dense", {"values": ArrayEntry("bfloat16", leaf.shape, "")})
    if format == "fp8":
        scales = (*out, -(-size // FP8_BLOCK))
        arrays = {
            "values": ArrayEntry("float8_e4m3fn", leaf.shape, ""),
            "block_scale": ArrayEntry("float32", scales, ""),
        }
        return LeafEntry("fp8_block", arrays)
    scalars = (leaf.shape[0] if leaf.stacked else 1, *[1] * len(out))
    arrays = {
        "codes": ArrayEntry("uint8", (*out, size // 2), ""),
        "block_scale": ArrayEntry("float8_e4m3fn", (*out, size // NVFP4_BLOCK), ""),
        "tensor_scale": ArrayEntry("float32", scalars, ""),
    }
    return LeafEntry("nvfp4", arrays)


def _name(leaf: Leaf) -> str:
    """The leaf's name without its axes."""
    return leaf.path.rpartition(".")[2].rpartition("_")[0]


def _kept_by_nvidia(leaf: Leaf) -> bool:
    attention = ".mla." in leaf.path or ".indexer." in leaf.path
    return leaf.path.startswith("mtp.") or (attention and _name(leaf) != "w_o")
