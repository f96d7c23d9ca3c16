"""Trees of parameters, equal layers and experts folded, with sizes, for a terminal and for a notebook."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ..checkpoint.manifest import ArrayEntry, LeafEntry
from ..checkpoint.weight_shapes import FORMATS, read_weight_shapes
from ..errors import UsageError
from ..model.model import Model
from ..quantization.formats import NVFP4, Fp8Block
from ..system.files import expand_path
from ..system.progress import format_count, format_size
from ..system.summary import escape, format_table
from .weights import converter


@dataclasses.dataclass(frozen=True, repr=False)
class Tree:
    """A tree that prints itself. `found` is the converter's Inspection: branches, sums by kind and format, notes."""

    found: Any

    def __repr__(self) -> str:
        return converter("report").format_inspection(self.found)

    def _repr_html_(self) -> str:
        """Return a section for each run of equal layers, and a table of sums."""
        parts = [f"<p>{escape(f'{self.found.folder} ({self.found.layout}): {self.found.title}')}</p>"]
        for branch in self.found.tree:
            layers = None if branch.layers is None else converter("name_folding").format_ranges(branch.layers)
            title = "outside of layers" if layers is None else f"layers {layers}"
            total = _sizes(sum(row.parameters for row in branch.rows), sum(row.nbytes for row in branch.rows))
            summary = escape(f"{title}: {total[0]} parameters, {total[1]}")
            rows = [
                (row.name, f"{row.count} x {list(row.shape)}", row.format, *_sizes(row.parameters, row.nbytes))
                for row in branch.rows
            ]
            parts.append(f"<details><summary>{summary}</summary>{format_table(rows)}</details>")
        sums = [(kind, format, *_sizes(*sizes)) for kind, format, *sizes in self.found.sizes]
        return "".join(
            [*parts, format_table([*sums, ("total", "", *_sizes(self.found.parameters, self.found.nbytes))])]
        )


def tree(what: str | Path | Model, format: str | None = None) -> Tree:
    """Return the tree of a folder in either layout, of a config.json with its matrices in `format` (as `dsv32 fit`), or
    of a loaded model. Headers are read, no weights. Raises UsageError, ConfigError, CheckpointError."""
    folder_tree = converter("inspect.folder_tree")
    if isinstance(what, Model):
        items = folder_tree.manifest_items(what.cfg, _entries(what))
        return Tree(folder_tree.summarize("a model", "loaded", what.cfg.to_dict(), items, []))
    if not isinstance(what, str | Path):
        raise UsageError(f"tree takes a folder, a config.json or a Model, not {type(what).__name__}")
    if expand_path(what).is_file():
        found = read_weight_shapes(what, format)
        entries = {path: _entry(weight) for path, weight in found.weights.items()}
        entries |= {path: LeafEntry("dense", {}, home) for path, home in found.homes.items()}
        items = folder_tree.manifest_items(found.cfg, entries)
        return Tree(folder_tree.summarize(what, format or FORMATS[0], found.cfg.to_dict(), items, []))
    return Tree(folder_tree.inspect(what))


def _entries(model: Model) -> Mapping[str, LeafEntry]:
    """Return the manifest entries of a model's parameters; an array that occurs twice is a shared copy."""
    named, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda x: isinstance(x, NVFP4 | Fp8Block))
    entries: dict[str, LeafEntry] = {}
    first: dict[int, str] = {}
    for keys, weight in named:
        path = jax.tree_util.keystr(keys, simple=True, separator=".")
        home = first.setdefault(id(weight), path)
        entry = _entry(weight)
        entries[path] = entry if home == path else LeafEntry(entry.format, {}, home)
    return entries


def _sizes(parameters: int, nbytes: int) -> tuple[str, str]:
    return format_count(parameters), format_size(nbytes)


def _entry(weight: Any) -> LeafEntry:
    """Return the manifest's entry of a weight, whose arrays may be shapes."""
    arrays = {"values": weight}
    if isinstance(weight, NVFP4 | Fp8Block):
        arrays = {field.name: getattr(weight, field.name) for field in dataclasses.fields(weight)}
    format = {NVFP4: "nvfp4", Fp8Block: "fp8_block"}.get(type(weight), "dense")
    return LeafEntry(format, {name: ArrayEntry(a.dtype.name, a.shape, "") for name, a in arrays.items()})
