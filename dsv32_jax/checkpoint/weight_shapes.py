"""The weights of a model as shapes: as a converted checkpoint stores them, or as one with this config.json would."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ..config import Config
from ..errors import CheckpointError, UsageError, listing
from ..layout import COPIES, Leaf, leaves
from ..parallel import partition
from ..quantization.formats import NVFP4, Fp8Block
from ..quantization.quantize import FP8_BLOCK, NVFP4_BLOCK
from ..system.files import expand_path
from .manifest import LeafEntry, Manifest, is_converted
from .random_checkpoint import is_quantized
from .reader import dtype_of

STORED = {"nvfp4": NVFP4, "fp8_block": Fp8Block}
"""The weights of formats that are not one array."""

ABSORBED = ("w_uk_HNC", "w_uv_HPC")
"""W^UK and W^UV are used by rows as well as by columns: `load` dequantizes them once to the compute dtype."""

FORMATS = ("nvfp4", "fp8", "bf16")
"""nvfp4: as published by NVIDIA, with experts, dense feed-forward and W^O in NVFP4, the rest of attention, the indexer
and the MTP head in bfloat16. fp8: the linears that DeepSeek publishes in FP8. bf16: every matrix in bfloat16."""


class WeightShapes(NamedTuple):
    """A config, its parameters by path, and the stored weight of each, whose arrays are ShapeDtypeStructs.

    A copy of another parameter (the embedding and head of MTP) has no weight but is in `homes`, under that one's path.
    """

    cfg: Config
    table: Mapping[str, Leaf]
    weights: Mapping[str, Any]
    homes: Mapping[str, str]

    @property
    def parameters(self) -> int:
        """The number of parameters, each counted once."""
        return sum(math.prod(self.table[path].shape) for path in self.weights)

    def get_loaded(self, path: str, dtype: np.dtype) -> Any:
        """Return the weight of `path` as `load` holds it: W^UK and W^UV are dequantized to the compute dtype."""
        if path.endswith(ABSORBED):
            return jax.ShapeDtypeStruct(self.table[path].shape, dtype)
        return self.weights[self.homes.get(path, path)]

    def count_step_bytes(self, rows: int) -> float:
        """Return the bytes of stored weights that a decode step is expected to read if `rows` rows choose experts each
        for itself: all that are used but the embedding, without the MTP head."""
        share = 1 - (1 - self.cfg.num_experts_per_tok / self.cfg.n_routed_experts) ** rows
        held = self.count_device_bytes({}, np.float32).items()
        return sum_step_bytes(self.table, {path: size for path, size in held if not path.endswith(ABSORBED)}, share)

    def device_bytes(self, mesh: partition.MeshShape, dtype) -> tuple[int, int]:
        """Return the bytes that one device of `mesh` holds of weights as stored, and of those that `load` dequantizes.
        Raises CapacityError."""
        sizes = self.count_device_bytes(mesh, dtype)
        dequantized = sum(size for path, size in sizes.items() if path.endswith(ABSORBED))
        return sum(sizes.values()) - dequantized, dequantized

    def count_device_bytes(self, mesh: partition.MeshShape, dtype) -> dict[str, int]:
        """Return the bytes that one device of `mesh` holds of each parameter, as `load` holds it. Raises CapacityError
        if the mesh does not divide them."""
        stored = [(self.table[path], array.shape) for path, w in self.weights.items() for array in jax.tree.leaves(w)]
        partition.check_divisible(mesh, stored)
        nbytes = {path: 0 for path in self.weights}
        for path in self.weights:
            for array in jax.tree.leaves(self.get_loaded(path, dtype_of(dtype))):
                local = partition.shard_shape(mesh, self.table[path], array.shape)
                nbytes[path] += math.prod(local) * array.dtype.itemsize
        return nbytes


def sum_step_bytes(table: Mapping[str, Leaf], sizes: Mapping[str, int], share: float) -> float:
    """Return how many of these bytes, by path, a decode step reads if it reads this share of the experts: all but the
    embedding and the MTP head."""
    read = [path for path in sizes if not path.startswith(("embed", "mtp."))]
    return sum(sizes[path] * (share if table[path].stacked else 1) for path in read)


def read_weight_shapes(path: str | Path, format: str | None = None) -> WeightShapes:
    """Read a converted checkpoint's manifest, or the config.json `path` of a model in `format` (default "nvfp4").

    Raises UsageError, ConfigError, CheckpointError.
    """
    path = expand_path(path)
    if path.is_file():
        if format not in (None, *FORMATS):
            raise UsageError(f"the format is one of {listing(FORMATS)}, not {format!r}; nothing was read")
        cfg = Config.from_json(path)
        table = {leaf.path: leaf for leaf in leaves(cfg)}
        weights = {path: _publish(leaf, format or FORMATS[0]) for path, leaf in table.items() if path not in COPIES}
        return WeightShapes(cfg, table, weights, {path: home for path, home in COPIES.items() if path in table})
    if format is not None:
        raise UsageError(f"a format is for a config.json; what {path} holds is in the formats of its manifest")
    if (path / "config.json").is_file() and not is_converted(path):
        raise CheckpointError(
            f"{path} is not converted: run `dsv32 convert {path} DST`, or ask what its config needs: "
            f"dsv32 fit {path / 'config.json'}"
        )
    manifest = Manifest.read(path)
    cfg = Config.from_dict(manifest.config, f"the config in {path.name}'s manifest")
    table = {leaf.path: leaf for leaf in leaves(cfg)}
    if differing := sorted(set(table) ^ set(manifest.leaves)):
        raise CheckpointError(f"{path} does not hold the parameters its config describes: {listing(differing)}")
    return describe(cfg, table, manifest)


def describe(cfg: Config, table: Mapping[str, Leaf], manifest: Manifest) -> WeightShapes:
    """Return the weights of a manifest, which has all of `table`."""
    homes = {path: entry.same_as for path, entry in manifest.leaves.items() if entry.same_as is not None}
    weights = {path: _describe(entry) for path, entry in manifest.leaves.items() if path not in homes}
    return WeightShapes(cfg, table, weights, homes)


def _describe(entry: LeafEntry) -> Any:
    arrays = {name: jax.ShapeDtypeStruct(a.shape, dtype_of(a.dtype)) for name, a in entry.arrays.items()}
    return STORED[entry.format](**arrays) if entry.format in STORED else arrays["values"]


def _publish(leaf: Leaf, format: str) -> Any:
    """Return the weight of a parameter in a checkpoint that is published in `format`."""
    if len(leaf.source_shape) == 1:
        return shape_weight(leaf, "float32")
    attention = (".mla." in leaf.path or ".indexer." in leaf.path) and not leaf.path.endswith("w_o_DHP")
    unquantized = format == "bf16" or not is_quantized(leaf)
    unquantized |= format == "nvfp4" and (leaf.path.startswith("mtp.") or attention)
    return shape_weight(leaf, "bfloat16" if unquantized else format)


def shape_weight(leaf: Leaf, storage: str) -> Any:
    """Return the weight of a parameter that is stored as "nvfp4", as "fp8", or in the plain dtype of that name."""
    *out, size = leaf.shape
    array: Any = jax.ShapeDtypeStruct
    if storage == "nvfp4":
        scalars = (leaf.shape[0] if leaf.stacked else 1, *[1] * len(out))
        scale = array((*out, size // NVFP4_BLOCK), dtype_of("float8_e4m3fn"))
        return NVFP4(array((*out, size // 2), np.uint8), scale, array(scalars, np.float32))
    if storage == "fp8":
        scale = array((*out, -(-size // FP8_BLOCK)), np.float32)
        return Fp8Block(array(leaf.shape, dtype_of("float8_e4m3fn")), scale)
    return array(leaf.shape, dtype_of(storage))
