"""What a folder holds, from headers alone: the tree of weights with layers and experts folded, sizes by kind and format.

A folder in Hugging Face layout is shown by the names of its weights (scales count as part of them), a converted one by
the leaves of the model.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dsv32_jax.config import Config
from dsv32_jax.errors import CheckpointError, ConfigError
from dsv32_jax.layout import leaves
from dsv32_jax.manifest import FILE, LeafEntry, Manifest

from .detect import detect
from .header import BY_NAME, Tensor
from .names import ranges
from .source import Source

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
class Item:
    """One weight, or one leaf: its layer and its name within (the number of its expert a star), what it is for, storage,
    logical shape, bytes with all scales. `parameters` is 0 for what is no weight."""

    layer: int | None
    name: str
    kind: str
    format: str
    shape: tuple[int, ...]
    parameters: int
    nbytes: int


@dataclasses.dataclass
class Row:
    """Weights of one layer, or of one group of layers, that differ in nothing but the number of their expert."""

    name: str
    format: str
    shape: tuple[int, ...]
    count: int
    parameters: int
    nbytes: int


@dataclasses.dataclass
class Branch:
    """A run of layers that hold the same rows (`layers` is None for what is outside of layers)."""

    layers: list[int] | None
    rows: list[Row]


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
    folder = Path(folder).expanduser().absolute()
    if (folder / FILE).exists():
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
    return _inspection(source.folder, "Hugging Face", source.config, items, notes)


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
        signature = (tensor.dtype, tensor.shape, base is name, *((t.dtype, t.shape) for t in beside))
        if signature not in storage:
            storage[signature] = _storage(base, tensor, tensors, beside)
        format, shape, nbytes = storage[signature]
        layer, rest = _split(base)
        pattern = _folded(rest)
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
    sources = {leaf.path: leaf.sources[0] for leaf in leaves(cfg)}
    items = [_leaf(path, leaf, manifest, sources.get(path, "")) for path, leaf in manifest.leaves.items()]
    report, mesh = manifest.report, manifest.storage.get("mesh")
    notes = [*report.get("notes", []), *(f"{count} ignored: {why}" for why, count in report.get("ignored", {}).items())]
    if mesh:
        notes.append(f"laid out for the mesh {', '.join(f'{axis}={size}' for axis, size in mesh.items())}")
    notes.append(f"made from {manifest.source.get('folder')}; digest {manifest.digest}")
    return _inspection(folder, "converted", manifest.config, items, notes)


def _leaf(path: str, entry: LeafEntry, manifest: Manifest, source: str) -> Item:
    kind = kind_of(source, path.startswith("mtp."))
    layer, name = _split(path)
    if entry.same_as is not None:
        return Item(layer, name, kind, f"= {entry.same_as}", _shape(manifest.leaves[entry.same_as]), 0, 0)
    shape = _shape(entry)
    nbytes = sum(math.prod(array.shape) * BY_NAME[array.dtype].itemsize for array in entry.arrays.values())
    format = entry.arrays["values"].dtype if entry.format == "dense" else entry.format
    return Item(layer, name, kind, format, shape, math.prod(shape), nbytes)


def _shape(entry: LeafEntry) -> tuple[int, ...]:
    if entry.format != "nvfp4":
        return entry.arrays["values"].shape
    *outer, packed = entry.arrays["codes"].shape
    return (*outer, 2 * packed)


def _inspection(folder: Path, layout: str, config: dict[str, Any], items: list[Item], notes: list[str]) -> Inspection:
    sizes: dict[tuple[str, str], list[int]] = collections.defaultdict(lambda: [0, 0])
    for item in items:
        size = sizes[item.kind, item.format]
        size[0] += item.parameters
        size[1] += item.nbytes
    return Inspection(
        folder=str(folder),
        layout=layout,
        title=_title(config),
        tree=list(_tree(items)),
        sizes=[(*key, *size) for key, size in sizes.items()],
        parameters=sum(item.parameters for item in items),
        nbytes=sum(item.nbytes for item in items),
        notes=notes,
    )


def _title(config: dict[str, Any]) -> str:
    names = ("model_type", "num_hidden_layers", "first_k_dense_replace", "n_routed_experts", "num_nextn_predict_layers")
    return ", ".join(f"{name} {config[name]}" for name in names if name in config)


def _tree(items: Iterable[Item]) -> Iterator[Branch]:
    """Rows by layer; consecutive layers of the same rows are one branch, with the sums of all."""
    found: dict[int | None, dict[tuple, Row]] = {}
    for item in items:
        rows, key = found.setdefault(item.layer, {}), (item.name, item.format, item.shape)
        if key not in rows:
            rows[key] = Row(*key, 0, 0, 0)
        _add(rows[key], 1, item.parameters, item.nbytes)
    if outside := found.pop(None, None):
        yield Branch(None, list(outside.values()))
    numbers = sorted(layer for layer in found if layer is not None)
    for _, run in itertools.groupby(numbers, key=lambda layer: {key: row.count for key, row in found[layer].items()}):
        first, *more = run
        for layer in more:
            for key, row in found[layer].items():
                _add(found[first][key], row.count, row.parameters, row.nbytes)
        yield Branch([first, *more], list(found[first].values()))


def _add(row: Row, count: int, parameters: int, nbytes: int) -> None:
    row.count, row.parameters, row.nbytes = row.count + count, row.parameters + parameters, row.nbytes + nbytes


def _split(name: str) -> tuple[int | None, str]:
    """The layer of a weight or leaf, and its name within."""
    inner = name.removeprefix("model.")
    if inner.startswith("layers."):
        _, number, *rest = inner.split(".", 2)
        if number.isdecimal() and len(number) < 10 and rest:
            return int(number), rest[0]
    return None, name


def _folded(name: str) -> str:
    """`name` with the number of its expert replaced by a star."""
    before, experts, after = name.partition("mlp.experts.")
    number, dot, rest = after.partition(".")
    return f"{before}{experts}*{dot}{rest}" if experts and number.isdecimal() else name


def layers_text(branch: Branch) -> str:
    """What a branch is called: "layers 3-60"."""
    return "" if branch.layers is None else f"layers {ranges(branch.layers)}"
