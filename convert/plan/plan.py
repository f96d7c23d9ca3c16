"""The plan of a conversion: what each leaf is made of and how it is stored, decided before any tensor data is read.

Everything that is missing, unknown, mismatched or unsupported is collected and reported together.
"""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dsv32_jax.checkpoint.manifest import FORMAT_VERSION, digest
from dsv32_jax.config import interpret
from dsv32_jax.config.keys import find_assumptions
from dsv32_jax.errors import CheckpointError, UsageError, argument, listing, pluralize
from dsv32_jax.layout import COPIES, Leaf, leaves
from dsv32_jax.quantization.quantize import Scaling
from dsv32_jax.quantization.scale_search import SCALINGS

from ..name_folding import fold_details
from ..read.source import CONFIG, Source
from ..read.weights import FACTORS, SCALES, MissingTensorsError, StoredWeight, detect
from ..transform.cut import LeafFormat, PlannedLeaf, choose_format, list_arrays, name_format
from ..transform.requantize import find_pairs
from .policy import FormatChooser, Recipe
from .scope import UnneededTensors


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole conversion: `leaves` in the order in which they are saved, `config` as the manifest will have it.

    `digest` covers everything that decides which bytes are written, `basis` the part of it that a user can change.
    `ignored` counts the tensors that the model does not need, by reason.
    """

    source: Source
    config: dict[str, Any]
    recipe: Recipe
    mesh: dict[str, int]
    leaves: tuple[PlannedLeaf, ...]
    notes: tuple[str, ...]
    ignored: dict[str, int]
    basis: dict[str, Any]
    digest: str

    @property
    def nbytes(self) -> int:
        """Bytes to write, at most."""
        return sum(leaf.nbytes for leaf in self.leaves)

    @property
    def formats(self) -> dict[str, int]:
        """The number of leaves in each format that are stored."""
        stored = (leaf.form.name for leaf in self.leaves if leaf.same_as is None)
        return dict(sorted(collections.Counter(stored).items()))

    @property
    def conversions(self) -> dict[str, int]:
        """The number of weights that change their format, by "from -> to"."""
        weights: dict[tuple[str, str], str] = {}
        for leaf in self.leaves:
            new = leaf.form.name
            weights |= {(s.name, new): name_format(s.format, s.values.dtype.lower()) for s in leaf.sources}
        changes = [f"{old} -> {new}" for (_, new), old in weights.items() if old != new]
        return dict(sorted(collections.Counter(changes).items()))

    @property
    def scaling(self) -> tuple[Scaling, list[tuple[StoredWeight, StoredWeight]]]:
        """How NVFP4 block scales are chosen, and the pairs of weights that share a tensor scale."""
        pairs = find_pairs(s for leaf in self.leaves for s in leaf.sources if s.wanted == "nvfp4")
        return SCALINGS[self.recipe.scales], pairs if self.recipe.tensor_scales == "shared" else []


def make_plan(source: Source, recipe: Recipe | None = None, mesh: dict[str, int] | None = None) -> Plan:
    """Plan the conversion of `source`; by default weights keep their formats, and arrays are laid out for one device.

    Raises ConfigError, CheckpointError listing every missing, unknown and mismatched tensor, or UsageError listing
    every weight that cannot be stored as the recipe says.
    """
    recipe = recipe or Recipe()
    cfg, raw, dropped, _ = interpret(source.config, str(source.folder / CONFIG))
    config = {key: value for key, value in raw.items() if key != "quantization_config"}
    notes = [*source.notes, *dropped, *find_assumptions(raw)]
    mtp = f"model.layers.{cfg.num_hidden_layers}."
    if cfg.num_nextn_predict_layers and not any(name.startswith(mtp) for name in source.tensors):
        cfg, config["num_nextn_predict_layers"] = dataclasses.replace(cfg, num_nextn_predict_layers=0), 0
        notes.append("config.json declares an MTP layer, but there are no tensors of it: converted without MTP")
    chooser = FormatChooser(recipe.policy, cfg.num_hidden_layers)
    planner = _LeafPlanner(source.tensors, chooser)
    planned = [leaf for leaf in map(planner.plan_leaf, leaves(cfg)) if leaf is not None]
    ignored = planner.ignore_unneeded(UnneededTensors(cfg, source.tensors, source.ignored_tensors))
    planner.raise_problems(str(source.folder))
    forms = {leaf.leaf.path: leaf.form for leaf in planned}
    planned = tuple(dataclasses.replace(p, form=forms[p.same_as]) if p.same_as else p for p in planned)
    notes += compare_declared(source.config, source.quantization, (s for leaf in planned for s in leaf.sources))
    changed = ((leaf.leaf.path, leaf.form.dequantized) for leaf in planned if leaf.form.dequantized)
    notes += [f"{path} is dequantized to bfloat16: {why}" for path, why in changed]
    notes += chooser.list_notes()
    basis = {
        "format_version": FORMAT_VERSION,
        "config": config,
        "files": source.identity,
        "recipe": [list(map(list, recipe.policy.rules)), recipe.policy.otherwise, recipe.scales, recipe.tensor_scales],
    }
    content = {
        **basis,
        "recipe": _describe_effect(recipe, planned),
        "leaves": [[leaf.leaf.path, leaf.form.format, leaf.arrays, leaf.same_as] for leaf in planned],
    }
    plan_digest = digest([digest(content), mesh]) if mesh else digest(content)
    basis["mesh"] = mesh = mesh or {}
    return Plan(source, config, recipe, mesh, planned, tuple(notes), ignored, basis, plan_digest)


def _describe_effect(recipe: Recipe, planned: Sequence[PlannedLeaf]) -> list[Any]:
    """Return what a recipe does to this checkpoint: recipes of the same effect are the same conversion."""
    wanted = {stored.name: stored.wanted for leaf in planned for stored in leaf.sources if stored.wanted}
    quantizes = "nvfp4" in wanted.values()
    return [wanted, recipe.scales if quantizes else None, recipe.tensor_scales if quantizes else None]


class _LeafPlanner:
    """Looks up the sources of every leaf and collects all problems instead of stopping at the first."""

    def __init__(self, tensors: Mapping[str, Any], chooser: FormatChooser):
        self._tensors, self._chooser = tensors, chooser
        self._claimed: set[str] = set()
        self._missing: dict[str, None] = {}
        self._mismatched: list[tuple[str, str]] = []
        self._unsupported: dict[str, None] = {}
        self._weights: dict[str, StoredWeight | None] = {}

    def plan_leaf(self, leaf: Leaf) -> PlannedLeaf | None:
        """Return the plan of `leaf`, None if its sources have problems."""
        if leaf.path in COPIES and not {leaf.sources[0], leaf.sources[0] + "_packed"} & self._tensors.keys():
            return PlannedLeaf(leaf, (), LeafFormat("dense", 1, ""), {}, same_as=COPIES[leaf.path])
        for name in leaf.sources:
            if name not in self._weights:
                self._weights[name] = self._detect(name, leaf)
        found = [self._weights[name] for name in leaf.sources]
        sources = tuple(stored for stored in found if stored is not None)
        if len(sources) < len(found):
            return None
        form = choose_format(leaf, sources)
        return PlannedLeaf(leaf, sources, form, list_arrays(leaf, form), copy_of=COPIES.get(leaf.path))

    def _detect(self, name: str, leaf: Leaf) -> StoredWeight | None:
        try:
            stored = detect(name, self._tensors)
        except CheckpointError as error:
            self._claimed |= {name, name + "_packed", *(name + suffix for suffix in SCALES)}
            self._claimed |= {name.removesuffix(".weight") + suffix for suffix in FACTORS}
            if isinstance(error, MissingTensorsError):
                self._missing |= dict.fromkeys(error.names)
            else:
                self._unsupported[str(error)] = None
            return None
        self._claimed |= {tensor.name for tensor in stored.tensors}
        if stored.shape != leaf.source_shape:
            self._mismatched.append((name, f"found {list(stored.shape)}, config.json says {list(leaf.source_shape)}"))
            return None
        return self._chooser.choose(stored)

    def ignore_unneeded(self, unneeded: UnneededTensors) -> dict[str, int]:
        """Claim the tensors that the model does not need; return their number by reason."""
        reasons = {name: unneeded.explain(name) for name in self._tensors if name not in self._claimed}
        found = {name: reason for name, reason in reasons.items() if reason is not None}
        unneeded.require_effect()
        self._claimed |= found.keys()
        return dict(collections.Counter(found.values()))

    def raise_problems(self, folder: str) -> None:
        """Raise CheckpointError with everything that was found, or UsageError if only the policy is to blame."""
        unknown = [(name, "") for name in self._tensors if name not in self._claimed]
        problems = (
            ("missing {}", "tensor", [(name, "") for name in self._missing]),
            ("wrong shape of {}", "tensor", self._mismatched),
            ("{}, which may change the model", "unknown tensor", unknown),
        )
        found = (
            (text.format(pluralize(len(items), noun)), fold_details(items)) for text, noun, items in problems if items
        )
        lines = [f"{text}: {'; '.join(names)}" for text, names in found]
        if unknown:
            lines[-1] += f" (if the model is right without them: {argument('ignore_tensors', 'PATTERN')})"
        if self._unsupported:
            count = pluralize(len(self._unsupported), "weight")
            lines.append(f"unsupported format of {count}: {listing(self._unsupported)}")
        if lines:
            raise CheckpointError(f"{folder} cannot be converted; nothing was written.\n  " + "\n  ".join(lines))
        if impossible := self._chooser.impossible:
            raise UsageError(
                f"{pluralize(len(impossible), 'weight')} cannot be stored as the policy says; nothing was written. "
                "Give them another format in a policy file: " + "; ".join(fold_details(impossible))
            )


def compare_declared(config: Mapping[str, Any], beside: Any, weights: Iterable[StoredWeight]) -> Iterator[str]:
    """Note where the declared quantization differs from the tensors, which decide: block sizes, a format not there.

    `config` is config.json, `beside` the content of hf_quant_config.json or None. Both often tell less than the
    files hold, or more.
    """
    declared = [found for found in (config.get("quantization_config"), beside) if isinstance(found, dict)]
    declared = [found["quantization"] if isinstance(found.get("quantization"), dict) else found for found in declared]
    sizes = {size for found in declared for size in _list_group_sizes(found)}
    blocks: dict[int, dict[str, None]] = {}
    for stored in weights:
        if stored.tensor_scale is not None:
            blocks.setdefault(stored.block, {})[stored.name] = None
    for block, names in sorted(blocks.items()):
        if sizes and block not in sizes:
            yield (
                f"{pluralize(len(names), 'weight')} with a scale per {block} inputs, but the declared group_size is "
                f"{listing(sorted(sizes))}: the scales decide ({listing(names, 2)})"
            )
    if not blocks and any("NVFP4" in str(found.get("quant_algo")) for found in declared):
        yield "the declared quant_algo is NVFP4, but no weight is NVFP4: the tensors decide"


def _list_group_sizes(declared: dict[str, Any]) -> Iterator[int]:
    """Yield the group sizes declared for all weights, for groups of them, and for single layers."""
    groups, layers = (declared.get(key) for key in ("config_groups", "quantized_layers"))
    parts = [part for found in (groups, layers) if isinstance(found, dict) for part in found.values()]
    parts += [part.get("weights") for part in parts if isinstance(part, dict)]
    for part in (declared, *parts):
        size = part.get("group_size") if isinstance(part, dict) else None
        if type(size) is int and size > 0:
            yield size
