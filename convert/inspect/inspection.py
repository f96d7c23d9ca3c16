"""What a folder holds, from headers alone: the tree of its weights, sizes by kind and format, and notes.

A folder in Hugging Face layout is shown by the names of its weights (scales count as part of them), a converted one by
the leaves of the model.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsv32_jax.checkpoint.manifest import LeafEntry, Manifest, is_converted
from dsv32_jax.config import Config
from dsv32_jax.errors import CheckpointError, ConfigError
from dsv32_jax.layout import leaves
from dsv32_jax.system.paths import path_of

from ..read.detect import detect
from ..read.header import BY_NAME, Tensor
from ..read.source import Source
from .folded_tree import Branch, Item, folded, split, tree

SCALES = ("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale")
BESIDE = tuple(scale.removeprefix("weight") for scale in SCALES)
OTHER = "no weight"
"""The kind of what belongs to no weight: activation scales, scales of a cache."""

KINDS = (
    ("mlp.experts.", "experts"),
    ("mlp.shared_experts.", "shared experts"),
    ("mlp.gate.", "router"),
    ("mlp.", "dense feed-forward"),
    ("self_attn.indexer.", "indexer"),
    ("layernorm", "norms"),
    ("self_attn.", "attention"),
    ("embed_tokens", "embedding"),
    ("head.weight", "head"),
    ("norm", "norms"),
)
"""The kind of a weight: the first whose text is in its name."""


@dataclasses.dataclass
class Inspection:
    """What `inspect` tells: `sizes` are [kind, format, parameters, bytes]."""

    folder: str
    layout: str
    title: str
    tree: list[Branch]
    sizes: list[tuple[str, str, int, int]]
    parameters: int
    nbytes: int
    notes: list[str]

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.nbytes / max(self.parameters, 1)


def inspect(folder: str | Path) -> Inspection:
    """What `folder` holds, in either layout. Raises CheckpointError that lists what is wrong with its headers."""
    folder = path_of(folder).absolute()
    if is_converted(folder):
        return _converted(folder)
    return of_source(Source(folder))


def of_source(source: Source) -> Inspection:
    """A folder in Hugging Face layout."""
    layers = source.config.get("num_hidden_layers")
    notes = list(source.notes)
    try:
        Config.from_dict(source.config, "config.json")
    except ConfigError as error:
        notes.append(str(error))
    items = list(weights(source.tensors, layers if isinstance(layers, int) else None))
    return summed(source.folder, "Hugging Face", source.config, items, notes)


def weights(tensors: Mapping[str, Tensor], layers: int | None) -> Iterator[Item]:
    """Every weight among `tensors`, with the scales that belong to it; what belongs to none comes by itself.

    `layers`: the number of the MTP layer. Names and storage that were seen before are looked up: a checkpoint has
    180,000 tensors and some dozens of each.
    """
    storage: dict[tuple, tuple[str, tuple[int, ...], int]] = {}
    kinds: dict[tuple[str, bool], str] = {}
    for name, tensor in tensors.items():
        if name.endswith(SCALES) and _owner(name, tensors):
            continue
        base = name.removesuffix("_packed")
        beside = [found for scale in BESIDE if (found := tensors.get(base + scale)) is not None]
        signature = (
            tensor.dtype,
            tensor.shape,
            base == name,
            base.endswith(".weight"),
            *((t.dtype, t.shape) for t in beside),
        )
        if signature not in storage:
            storage[signature] = _storage(base, tensor, tensors, beside)
        format, shape, nbytes = storage[signature]
        layer, rest = split(base)
        pattern = folded(rest)
        if (pattern, layer == layers) not in kinds:
            kinds[pattern, layer == layers] = kind_of(pattern, layer is not None and layer == layers)
        kind = kinds[pattern, layer == layers]
        yield Item(layer, pattern, kind, format, shape, 0 if kind == OTHER else math.prod(shape), nbytes)


def kind_of(name: str, mtp: bool) -> str:
    """What the weight `name` is for; `mtp`: whether it lies in the MTP layer."""
    if not name.endswith((".weight", ".bias", "_bias")):
        return OTHER
    return "MTP" if mtp else next((kind for text, kind in KINDS if text in name), "other")


def _owner(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the scale `name` belongs to a weight that is there."""
    base = name[: name.rfind("weight") + len("weight")]
    return base in tensors or base + "_packed" in tensors


def _storage(
    name: str, tensor: Tensor, tensors: Mapping[str, Tensor], beside: list[Tensor]
) -> tuple[str, tuple[int, ...], int]:
    """Format, logical shape and bytes of a weight; where the format is not read, what the tensor itself says."""
    nbytes = tensor.nbytes + sum(scale.nbytes for scale in beside)
    try:
        stored = detect(name, tensors)
    except CheckpointError:
        return tensor.dtype.lower(), tensor.shape, nbytes
    return tensor.dtype.lower() if stored.format == "dense" else stored.format, stored.shape, nbytes


def _converted(folder: Path) -> Inspection:
    """A converted checkpoint."""
    manifest = Manifest.read(folder)
    cfg = Config.from_dict(manifest.config, f"the config in {folder.name}'s manifest")
    items = of_leaves(cfg, manifest.leaves)
    report, mesh = manifest.report, manifest.storage.get("mesh")
    notes = [*report.get("notes", []), *(f"{count} ignored: {why}" for why, count in report.get("ignored", {}).items())]
    if mesh:
        notes.append(f"laid out for the mesh {', '.join(f'{axis}={size}' for axis, size in mesh.items())}")
    notes.append(f"made from {manifest.source.get('folder')}; digest {manifest.digest}")
    return summed(folder, "converted", manifest.config, items, notes)


def of_leaves(cfg: Config, entries: Mapping[str, LeafEntry]) -> list[Item]:
    """The leaves of a model by what a manifest says of them."""
    sources = {leaf.path: leaf.sources[0] for leaf in leaves(cfg)}
    return [_leaf(path, leaf, entries, sources.get(path, "")) for path, leaf in entries.items()]


def _leaf(path: str, entry: LeafEntry, entries: Mapping[str, LeafEntry], source: str) -> Item:
    kind = kind_of(source, path.startswith("mtp."))
    layer, name = split(path)
    if entry.same_as is not None:
        return Item(layer, name, kind, f"= {entry.same_as}", _shape(entries[entry.same_as]), 0, 0)
    shape = _shape(entry)
    nbytes = sum(math.prod(array.shape) * BY_NAME[array.dtype].itemsize for array in entry.arrays.values())
    format = entry.arrays["values"].dtype if entry.format == "dense" else entry.format
    return Item(layer, name, kind, format, shape, math.prod(shape), nbytes)


def _shape(entry: LeafEntry) -> tuple[int, ...]:
    if entry.format != "nvfp4":
        return entry.arrays["values"].shape
    *outer, packed = entry.arrays["codes"].shape
    return (*outer, 2 * packed)


def summed(folder: str | Path, layout: str, config: dict[str, Any], items: list[Item], notes: list[str]) -> Inspection:
    """Tree and sums of `items`."""
    sizes: dict[tuple[str, str], list[int]] = collections.defaultdict(lambda: [0, 0])
    for item in items:
        size = sizes[item.kind, item.format]
        size[0] += item.parameters
        size[1] += item.nbytes
    return Inspection(
        folder=str(folder),
        layout=layout,
        title=_title(config),
        tree=list(tree(items)),
        sizes=[(kind, format, size[0], size[1]) for (kind, format), size in sizes.items()],
        parameters=sum(item.parameters for item in items),
        nbytes=sum(item.nbytes for item in items),
        notes=notes,
    )


def _title(config: dict[str, Any]) -> str:
    names = ("model_type", "num_hidden_layers", "first_k_dense_replace", "n_routed_experts", "num_nextn_predict_layers")
    return ", ".join(f"{name} {config[name]}" for name in names if name in config)
