"""What a conversion will do, decided and checked before any tensor data is read."""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from dsv32_jax.checkpoint.manifest import FORMAT_VERSION, digest
from dsv32_jax.config import Config
from dsv32_jax.layout import COPIES, Leaf, leaves

from ..read import declared_quant
from ..read.header import BY_NAME
from ..read.source import Source
from ..read.stored import Stored
from ..transform.cut import Form, arrays, choose
from .policy import Chooser, Recipe
from .survey import Survey

SHORT = {"fp8_block": "fp8", "bfloat16": "bf16", "float16": "f16", "float32": "f32"}
"""Names of formats and dtypes as users write them."""


@dataclasses.dataclass(frozen=True, eq=False)
class PlannedLeaf:
    """One leaf: where it comes from and what is stored of it.

    `same_as`: the source leaves this copy out, nothing is stored. `copy_of`: the source has the copy, which is stored
    only if it differs. `arrays`: dtype name and shape of each component.
    """

    leaf: Leaf
    sources: tuple[Stored, ...]
    form: Form
    arrays: dict[str, tuple[str, tuple[int, ...]]]
    same_as: str | None = None
    copy_of: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all components."""
        return sum(math.prod(shape) * BY_NAME[name].itemsize for name, shape in self.arrays.values())


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole conversion: `leaves` in the order in which they are saved; the manifest gets `config`.

    `digest` covers everything that decides which bytes are written, `basis` what of it a person can change.
    """

    config: dict[str, Any]
    recipe: Recipe
    leaves: tuple[PlannedLeaf, ...]
    notes: tuple[str, ...]
    ignored: dict[str, int]
    basis: dict[str, Any]
    digest: str

    @property
    def nbytes(self) -> int:
        """Bytes that will be written, at most."""
        return sum(leaf.nbytes for leaf in self.leaves)

    @property
    def formats(self) -> dict[str, int]:
        """How many leaves are stored in each format."""
        return dict(sorted(collections.Counter(leaf.form.format for leaf in self.leaves).items()))

    @property
    def conversions(self) -> dict[str, int]:
        """How many weights change their format, by "from -> to"."""
        changes = {(stored.name, _change(stored, leaf.form)) for leaf in self.leaves for stored in leaf.sources}
        return dict(sorted(collections.Counter(change for _, change in changes if change).items()))


def plan(source: Source, recipe: Recipe | None = None) -> Plan:
    """The conversion of `source`; by default formats are kept.

    Raises ConfigError, CheckpointError that lists every missing, unknown and mismatched tensor, or UsageError that
    lists every weight which cannot be stored as the recipe says.
    """
    recipe = recipe or Recipe()
    cfg = Config.from_dict(source.config, str(source.folder / "config.json"))
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    notes = list(source.notes)
    if cfg.num_nextn_predict_layers and not _has_layer(source, cfg.num_hidden_layers):
        cfg = dataclasses.replace(cfg, num_nextn_predict_layers=0)
        config = {**config, "num_nextn_predict_layers": 0}
        notes.append("config.json announces an MTP layer, but there are no tensors of it: converted without MTP")
    chooser = Chooser(recipe.policy, cfg.num_hidden_layers)
    survey = Survey(source.tensors, chooser)
    planned = [_planned(leaf, survey) for leaf in leaves(cfg)]
    ignored = survey.ignored()
    survey.raise_problems(str(source.folder))
    kept = [leaf for leaf in planned if leaf is not None]
    by_path = {leaf.leaf.path: leaf for leaf in kept}
    kept = tuple(_share(leaf, by_path) for leaf in kept)
    stored = {s.name: s for leaf in kept for s in leaf.sources}
    notes += declared_quant.disagreements(source.config, source.quantization, stored.values())
    lossy = [leaf for leaf in kept if leaf.form.dequantized]
    notes += [f"{leaf.leaf.path} is dequantized to bfloat16: {leaf.form.dequantized}" for leaf in lossy]
    if recipe.policy.file is not None:
        notes += [f"{recipe.policy.file}: {one}" for one in chooser.idle()]
    rules = [list(rule) for rule in recipe.policy.rules]
    basis = {
        "format_version": FORMAT_VERSION,
        "config": config,
        "files": source.identity,
        "recipe": [rules, recipe.policy.otherwise, recipe.scales, recipe.tensor_scales],
    }
    content = {
        **basis,
        "recipe": _effect(recipe, kept),
        "leaves": [[p.leaf.path, p.form.format, p.arrays, p.same_as] for p in kept],
    }
    return Plan(config, recipe, kept, tuple(notes), ignored, basis, digest(content))


def _planned(leaf: Leaf, survey: Survey) -> PlannedLeaf | None:
    """The plan of `leaf`, None where its sources have problems."""
    if leaf.path in COPIES and not survey.has(leaf.sources[0]):
        return PlannedLeaf(leaf, (), Form("dense", 1, ""), {}, same_as=COPIES[leaf.path])
    sources = survey.sources(leaf)
    if sources is None:
        return None
    form = choose(leaf, sources)
    return PlannedLeaf(leaf, sources, form, arrays(leaf, form), copy_of=COPIES.get(leaf.path))


def _change(stored: Stored, form: Form) -> str:
    """What becomes of the format of `stored` in a leaf of `form`, empty where nothing does."""
    before = stored.values.dtype.lower() if stored.format == "dense" else SHORT.get(stored.format, stored.format)
    after = SHORT.get(form.dtype, "") if form.format == "dense" else SHORT.get(form.format, form.format)
    return "" if before == after else f"{before} -> {after}"


def _effect(recipe: Recipe, planned: Sequence[PlannedLeaf]) -> list[Any]:
    """What a recipe does to this checkpoint: other words for the same are the same conversion."""
    wanted = {stored.name: stored.wanted for leaf in planned for stored in leaf.sources if stored.wanted}
    quantizes = "nvfp4" in wanted.values()
    return [wanted, recipe.scales if quantizes else None, recipe.tensor_scales if quantizes else None]


def _has_layer(source: Source, layer: int) -> bool:
    return any(name.startswith(f"model.layers.{layer}.") for name in source.tensors)


def _share(planned: PlannedLeaf, by_path: dict[str, PlannedLeaf]) -> PlannedLeaf:
    """A leaf that the source leaves out has its original's form."""
    return dataclasses.replace(planned, form=by_path[planned.same_as].form) if planned.same_as else planned
