"""The tree of a checkpoint folder, from headers alone: weights with layers and experts folded, sizes, notes.

A Hugging Face folder is shown by the names of its weights, scales counted with the weight they belong to; a converted
checkpoint by the model's parameters.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsv32_jax.checkpoint.manifest import LeafEntry, Manifest, is_converted
from dsv32_jax.config import Config
from dsv32_jax.config.keys import find_assumptions
from dsv32_jax.errors import CheckpointError, ConfigError
from dsv32_jax.layout import fold_expert, leaves, split_layer
from dsv32_jax.system.files import expand_path

from ..read.safetensors import Tensor
from ..read.source import Source
from ..read.weights import SCALES, detect, split_weight
from ..transform.cut import name_format

OTHER = "no weight"
"""The kind of a tensor that belongs to no weight, such as an activation scale."""

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
"""Kinds of weights by a part of their name; the first match decides."""


class Item(NamedTuple):
    """One weight or parameter: its layer, its name within (experts as *), logical shape, bytes with all scales.

    `parameters` is 0 for a tensor that belongs to no weight, and for a shared copy.
    """

    layer: int | None
    name: str
    kind: str
    format: str
    shape: tuple[int, ...]
    parameters: int
    nbytes: int


@dataclasses.dataclass
class Row:
    """Weights of one branch that differ only in their layer or expert."""

    name: str
    format: str
    shape: tuple[int, ...]
    count: int
    parameters: int
    nbytes: int


@dataclasses.dataclass
class Branch:
    """Consecutive layers with the same rows (`layers` is None outside the layers)."""

    layers: list[int] | None
    rows: list[Row]


@dataclasses.dataclass
class Inspection:
    """Contents of a folder; `sizes` are (kind, format, parameters, bytes)."""

    folder: str
    layout: str
    title: str
    tree: list[Branch]
    sizes: list[tuple[str, str, int, int]]
    parameters: int
    nbytes: int
    bits_per_weight: float
    notes: list[str]


def inspect(folder: str | Path) -> Inspection:
    """Inspect a folder in either layout. Raises CheckpointError that lists everything wrong with its headers."""
    folder = expand_path(folder).absolute()
    return _inspect_converted(folder) if is_converted(folder) else inspect_source(Source(folder))


def inspect_source(source: Source) -> Inspection:
    """Inspect a folder in Hugging Face layout."""
    notes = [*source.notes, *find_assumptions(source.config)]
    try:
        Config.from_dict(source.config, "config.json")
    except ConfigError as error:
        notes.append(str(error))
    layers = source.config.get("num_hidden_layers")
    items = source_items(source.tensors, layers if isinstance(layers, int) else None)
    return summarize(source.folder, "Hugging Face", source.config, items, notes)


def _inspect_converted(folder: Path) -> Inspection:
    manifest = Manifest.read(folder)
    cfg = Config.from_dict(manifest.config, f"the config in {folder.name}'s manifest")
    report, mesh = manifest.report, manifest.storage["mesh"]
    notes = [*report["notes"], *(f"{count} ignored: {why}" for why, count in report["ignored"].items())]
    if mesh:
        notes.append(f"laid out for the mesh {', '.join(f'{axis}={size}' for axis, size in mesh.items())}")
    notes.append(f"made from {manifest.source['folder']}; digest {manifest.digest}")
    return summarize(folder, "converted", manifest.config, manifest_items(cfg, manifest.leaves), notes)


def source_items(tensors: Mapping[str, Tensor], mtp_layer: int | None) -> Iterator[Item]:
    """Every weight among `tensors` with its scales; a tensor that belongs to none is an item of its own.

    Kinds and formats are cached: a checkpoint has 180,000 tensors and some dozens of different ones.
    """
    storage: dict[tuple, tuple[str, tuple[int, ...], int]] = {}
    for name, tensor in tensors.items():
        weight, suffix = split_weight(name) if name.endswith(SCALES) else (name, "")
        if suffix in SCALES and {weight, weight + "_packed"} & tensors.keys():
            continue
        base = name.removesuffix("_packed")
        found = [tensor, *[tensors[base + suffix] for suffix in SCALES if base + suffix in tensors]]
        signature = (base == name, base.endswith(".weight"), *[(one.dtype, one.shape) for one in found])
        if signature not in storage:
            try:
                stored = detect(base, tensors)
                format, shape = name_format(stored.format, tensor.dtype.lower()), stored.shape
            except CheckpointError:
                format, shape = tensor.dtype.lower(), tensor.shape
            storage[signature] = format, shape, sum(one.nbytes for one in found)
        format, shape, nbytes = storage[signature]
        layer, rest = split_layer(base)
        pattern = fold_expert(rest)
        kind = _kind_of(pattern, layer is not None and layer == mtp_layer)
        yield Item(layer, pattern, kind, format, shape, 0 if kind == OTHER else math.prod(shape), nbytes)


@functools.lru_cache(maxsize=4096)
def _kind_of(name: str, is_mtp: bool) -> str:
    if not name.endswith((".weight", ".bias", "_bias")):
        return OTHER
    return "MTP" if is_mtp else next((kind for part, kind in KINDS if part in name), "other")


def manifest_items(cfg: Config, entries: Mapping[str, LeafEntry]) -> Iterator[Item]:
    """The parameters of a model, from their manifest entries."""
    sources = {leaf.path: leaf.sources[0] for leaf in leaves(cfg)}
    for path, entry in entries.items():
        kind = _kind_of(sources.get(path, ""), path.startswith("mtp."))
        layer, name = split_layer(path)
        if entry.same_as is not None:
            yield Item(layer, name, kind, f"= {entry.same_as}", entries[entry.same_as].shape or (), 0, 0)
            continue
        shape, arrays = entry.shape or (), list(entry.arrays.values())
        nbytes = sum(array.nbytes for array in arrays)
        yield Item(layer, name, kind, name_format(entry.format, arrays[0].dtype), shape, math.prod(shape), nbytes)


def summarize(
    folder: str | Path, layout: str, config: dict[str, Any], found: Iterable[Item], notes: list[str]
) -> Inspection:
    """The Inspection of the items `found`: their tree, and sums by kind and format."""
    items = list(found)
    alike: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        alike.setdefault((item.kind, item.format), []).append(item)
    parameters, nbytes = _sum_sizes(items)
    keys = ("model_type", "num_hidden_layers", "first_k_dense_replace", "n_routed_experts", "num_nextn_predict_layers")
    return Inspection(
        folder=str(folder),
        layout=layout,
        title=", ".join(f"{key} {config[key]}" for key in keys if key in config),
        tree=list(build_tree(items)),
        sizes=[(*key, *_sum_sizes(some)) for key, some in alike.items()],
        parameters=parameters,
        nbytes=nbytes,
        bits_per_weight=8 * nbytes / max(parameters, 1),
        notes=notes,
    )


def _sum_sizes(items: Sequence[Item]) -> tuple[int, int]:
    """Parameters and bytes of `items`."""
    return sum(item.parameters for item in items), sum(item.nbytes for item in items)


def build_tree(items: Iterable[Item]) -> Iterator[Branch]:
    """Group `items` by layer; consecutive layers with the same rows become one branch with their sums."""
    layers: dict[int | None, dict[tuple[str, str, tuple[int, ...]], list[Item]]] = {}
    for item in items:
        layers.setdefault(item.layer, {}).setdefault((item.name, item.format, item.shape), []).append(item)

    def sum_rows(run: Sequence[int | None]) -> list[Row]:
        alike = {key: [item for layer in run for item in layers[layer][key]] for key in layers[run[0]]}
        return [Row(*key, len(found), *_sum_sizes(found)) for key, found in alike.items()]

    if None in layers:
        yield Branch(None, sum_rows([None]))
    numbers = sorted(layer for layer in layers if layer is not None)
    for _, run in itertools.groupby(numbers, lambda layer: {key: len(found) for key, found in layers[layer].items()}):
        yield Branch(run := list(run), sum_rows(run))
