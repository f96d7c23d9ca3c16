"""What a conversion will do, decided and checked before any tensor data is read."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from dsv32_jax.config import Config
from dsv32_jax.errors import CheckpointError, listing
from dsv32_jax.layout import COPIES, Leaf, leaves
from dsv32_jax.manifest import FORMAT_VERSION, digest

from .cut import Form, arrays, choose
from .detect import MissingTensors, Stored, detect
from .header import BY_NAME, Tensor
from .names import grouped, with_detail
from .source import Source

GROUP_BYTES = 256 << 20

IGNORED = (
    (r".*\.input_scale", "activation scales: activations are not quantized"),
    (r".*\.input_global_scale", "activation scales: activations are not quantized"),
    (r".*\.self_attn\.(k_proj\.k_scale|v_proj\.v_scale)", "scales of another implementation's key-value cache"),
    (r".*\.rotary_emb\.inv_freq", "computed from the configuration"),
)
"""Tensors that a checkpoint may have and the model does not need: pattern, reason."""

SIBLINGS = ("", "_packed", "_scale", "_scale_inv", "_scale_2", "_global_scale")
"""What may follow a weight's name; where its storage is not understood, none of them is called unknown as well."""


@dataclasses.dataclass(frozen=True)
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
    """A whole conversion. `groups` are the leaves that are saved together, in order; the manifest gets `config`."""

    config: dict[str, Any]
    groups: tuple[tuple[PlannedLeaf, ...], ...]
    notes: tuple[str, ...]
    ignored: dict[str, int]
    digest: str

    @property
    def leaves(self) -> Iterator[PlannedLeaf]:
        """Every leaf, in order."""
        return (leaf for group in self.groups for leaf in group)

    @property
    def nbytes(self) -> int:
        """Bytes that will be written, at most."""
        return sum(leaf.nbytes for leaf in self.leaves)

    @property
    def formats(self) -> dict[str, int]:
        """How many leaves are stored in each format."""
        return dict(sorted(collections.Counter(leaf.form.format for leaf in self.leaves).items()))


def plan(source: Source, group_bytes: int = GROUP_BYTES) -> Plan:
    """The conversion of `source`, saved `group_bytes` at a time (a larger leaf alone).

    Raises ConfigError, or CheckpointError that lists every missing, unknown and mismatched tensor.
    """
    cfg = Config.from_dict(source.config, str(source.folder / "config.json"))
    config, notes = source.config, list(source.notes)
    if cfg.num_nextn_predict_layers and not _has_layer(source, cfg.num_hidden_layers):
        cfg = dataclasses.replace(cfg, num_nextn_predict_layers=0)
        config = {**config, "num_nextn_predict_layers": 0}
        notes.append("config.json announces an MTP layer, but there are no tensors of it: converted without MTP")
    survey = _Survey(source.tensors)
    planned = [survey.leaf(leaf) for leaf in leaves(cfg)]
    ignored = survey.ignored()
    survey.raise_problems(str(source.folder))
    kept = [leaf for leaf in planned if leaf is not None]
    by_path = {leaf.leaf.path: leaf for leaf in kept}
    kept = [_share(leaf, by_path) for leaf in kept]
    groups = tuple(_groups(kept, group_bytes))
    lossy = [leaf for leaf in kept if leaf.form.dequantized]
    notes += [f"{leaf.leaf.path} is dequantized to bfloat16: {leaf.form.dequantized}" for leaf in lossy]
    content = {
        "format_version": FORMAT_VERSION,
        "config": config,
        "source": source.identity,
        "groups": [[[p.leaf.path, p.form.format, p.arrays, p.same_as] for p in group] for group in groups],
    }
    return Plan(config, groups, tuple(notes), ignored, digest(content))


class _Survey:
    """Looks up the sources of every leaf and collects all problems instead of stopping at the first."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors
        self.claimed: set[str] = set()
        self.missing: dict[str, None] = {}
        self.mismatched: list[tuple[str, str]] = []
        self.refused: dict[str, None] = {}
        self.detected: dict[str, Stored | None] = {}

    def leaf(self, leaf: Leaf) -> PlannedLeaf | None:
        """The plan of `leaf`, None where its sources have problems."""
        if leaf.path in COPIES and not _any_sibling(leaf.sources[0], self.tensors):
            return PlannedLeaf(leaf, (), Form("dense", 1, ""), {}, same_as=COPIES[leaf.path])
        found = [self._stored(name, leaf) for name in leaf.sources]
        sources = tuple(stored for stored in found if stored is not None)
        if len(sources) < len(found):
            return None
        form = choose(leaf, sources)
        return PlannedLeaf(leaf, sources, form, arrays(leaf, form), copy_of=COPIES.get(leaf.path))

    def _stored(self, name: str, leaf: Leaf) -> Stored | None:
        if name not in self.detected:
            self.detected[name] = self._detect(name, leaf)
        return self.detected[name]

    def _detect(self, name: str, leaf: Leaf) -> Stored | None:
        try:
            stored = detect(name, self.tensors)
        except CheckpointError as error:
            self.claimed |= {name + suffix for suffix in SIBLINGS}
            if isinstance(error, MissingTensors):
                self.missing |= dict.fromkeys(error.names)
            else:
                self.refused[str(error)] = None
            return None
        self.claimed |= {tensor.name for tensor in stored.tensors}
        if stored.shape != leaf.source_shape:
            self.mismatched.append((name, f"found {list(stored.shape)}, config.json says {list(leaf.source_shape)}"))
            return None
        return stored

    def ignored(self) -> dict[str, int]:
        """How many tensors each reason of IGNORED covers; they are claimed from now on."""
        counts: collections.Counter[str] = collections.Counter()
        for name in self.tensors:
            reason = next((why for pattern, why in IGNORED if re.fullmatch(pattern, name)), None)
            if name not in self.claimed and reason is not None:
                self.claimed.add(name)
                counts[reason] += 1
        return dict(counts)

    def raise_problems(self, folder: str) -> None:
        """Raise CheckpointError with everything that was found."""
        unknown = [name for name in self.tensors if name not in self.claimed]
        sections = []
        if self.missing:
            sections.append(f"{len(self.missing)} tensors are missing: {'; '.join(grouped(self.missing))}")
        if self.mismatched:
            details = "; ".join(with_detail(self.mismatched))
            sections.append(f"{len(self.mismatched)} tensors have another shape: {details}")
        if self.refused:
            texts = listing(self.refused)
            sections.append(f"{len(self.refused)} weights are stored in a way that is not read: {texts}")
        if unknown:
            names = "; ".join(grouped(unknown))
            sections.append(f"{len(unknown)} tensors are unknown, and may change the model: {names}")
        if sections:
            raise CheckpointError(f"{folder} cannot be converted; nothing was written.\n  " + "\n  ".join(sections))


def _has_layer(source: Source, layer: int) -> bool:
    return any(name.startswith(f"model.layers.{layer}.") for name in source.tensors)


def _any_sibling(name: str, tensors: dict[str, Tensor]) -> bool:
    return name in tensors or name + "_packed" in tensors


def _share(planned: PlannedLeaf, by_path: dict[str, PlannedLeaf]) -> PlannedLeaf:
    """A leaf that the source leaves out has its original's form."""
    return dataclasses.replace(planned, form=by_path[planned.same_as].form) if planned.same_as else planned


def _groups(planned: list[PlannedLeaf], limit: int) -> Iterator[tuple[PlannedLeaf, ...]]:
    """Runs of consecutive leaves of at most `limit` bytes, or of one leaf."""
    group: list[PlannedLeaf] = []
    size = 0
    for leaf in planned:
        if group and size + leaf.nbytes > limit:
            yield tuple(group)
            group, size = [], 0
        group.append(leaf)
        size += leaf.nbytes
    yield tuple(group)
