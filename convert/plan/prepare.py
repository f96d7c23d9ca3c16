"""The user's options checked and the conversion planned: all that is known before a byte of a tensor is read."""

import copy
import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from dsv32_jax.checkpoint import vocabulary
from dsv32_jax.checkpoint.manifest import digest
from dsv32_jax.config import Config
from dsv32_jax.errors import UsageError, argument, listing, pluralize, unknown
from dsv32_jax.parallel import partition
from dsv32_jax.system.files import expand_path

from ..read.source import CONFIG, Source
from . import limits
from .limits import Budget, Group
from .output import require_apart, require_readable_companions
from .plan import Plan, PlannedLeaf, plan
from .policy import make_recipe


class Options(TypedDict, total=False):
    """How to convert; all options have defaults."""

    to: str | None  # "nvfp4", "fp8" or "bf16"; by default weights keep their format
    policy: str | Path | None  # the weights to convert: a preset or a file (policy.py)
    scales: str  # how NVFP4 block scales are chosen: "rtn", "mse" or "four-over-six"
    tensor_scales: str  # each matrix's "own", or "shared" by gate and up and by q_a and kv_a
    layers: str | None  # "0-3": only the first layers, as a model of its own without the MTP layer
    mesh: str | Mapping[str, int] | None  # "expert=8,model=2" or a dict: a device can read its own bytes
    max_memory: str | int | None  # bytes, or "8GiB"; by default 80 % of free memory
    workers: int | None  # threads that read and convert; by default one per core
    strict_index: bool  # refuse a source whose index does not list every tensor of its shards
    verify_source: bool  # first compare every shard with the SHA-256 that `hf download` recorded
    group_bytes: int  # small leaves are saved together, about so many bytes at a time


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A conversion that is ready to run. `digest` and `basis` are those of the plan, for this mesh."""

    source: Source
    dst: Path
    plan: Plan
    mesh: dict[str, int]
    budget: Budget
    group_bytes: int

    @property
    def basis(self) -> dict[str, Any]:
        """What a user can change between two runs and must not."""
        return {**self.plan.basis, "mesh": self.mesh}

    @property
    def digest(self) -> str:
        """Equal for two runs that write the same bytes, whatever their memory and workers."""
        return digest([self.plan.digest, self.mesh]) if self.mesh else self.plan.digest

    @functools.cached_property
    def peak(self) -> int:
        """Bytes of memory that the conversion takes at most."""
        return limits.peak_memory(self.group_leaves(self.plan.leaves), self.budget)

    def group_leaves(self, leaves: Sequence[PlannedLeaf]) -> list[Group]:
        """Return `leaves` in the groups in which they are saved."""
        return list(limits.group_leaves(leaves, self.budget.limit, self.group_bytes))


def prepare(src: str | Path, dst: str | Path, options: Options) -> Prepared:
    """Read the headers of `src` and plan its conversion to `dst`. Nothing is written.

    Raises UsageError, ConfigError, CheckpointError, or CapacityError if the memory or the mesh does not suffice.
    """
    if wrong := unknown(options, Options.__annotations__):
        raise UsageError(f"unknown {'option' if len(wrong) == 1 else 'options'}: {listing(wrong)}. Nothing was read")
    src, dst = expand_path(src).absolute(), expand_path(dst).absolute()
    to, policy = options.get("to"), options.get("policy")
    scales, tensor_scales = options.get("scales", "rtn"), options.get("tensor_scales", "own")
    if (scales, tensor_scales) != ("rtn", "own") and to != "nvfp4" and policy is None:
        raise UsageError(
            f"{argument('scales')} and {argument('tensor_scales')} apply to weights that become NVFP4, and none does: "
            f"add {argument('to', 'nvfp4')}. Nothing was read"
        )
    recipe = make_recipe(to, policy, scales, tensor_scales)
    budget = limits.make_budget(options.get("max_memory"), options.get("workers"))
    mesh = partition.optional(options.get("mesh"))
    require_apart(src, dst)
    source = Source(src)
    require_readable_companions(src)
    if options.get("strict_index"):
        source.require_complete_index()
    if (layers := options.get("layers")) is not None:
        source = select_first_layers(source, layers)
    planned = plan(source, recipe)
    vocabulary.check(src, Config.from_dict(source.config, str(src / CONFIG)))
    partition.check(mesh, [(leaf.leaf, shape) for leaf in planned.leaves for _, shape in leaf.arrays.values()])
    limits.require_limit(planned.leaves, budget.limit)
    return Prepared(source, dst, planned, mesh, budget, options.get("group_bytes", limits.GROUP_BYTES))


def select_first_layers(source: Source, layers: str) -> Source:
    """Return `source` as a smaller model: only the first `layers` ("0-3": the first four) and no MTP layer.

    The layers must begin with 0, since each computes on the output of those before it. Raises UsageError.
    """
    cfg = Config.from_dict(source.config, str(source.folder / CONFIG))
    match, given = re.fullmatch(r"0(?:-(\d{1,9}))?", str(layers).strip()), argument("layers", layers)
    if match is None:
        raise UsageError(f"invalid {given}: write 0-N for the first N + 1 layers. Nothing was written")
    count = int(match[1] or 0) + 1
    if count > cfg.num_hidden_layers:
        raise UsageError(f"{given} is out of range; layers are 0-{cfg.num_hidden_layers - 1}. Nothing was written")
    small = copy.copy(source)
    small.tensors = {name: tensor for name, tensor in source.tensors.items() if _layer_of(name) < count}
    small.config = {
        **source.config,
        "num_hidden_layers": count,
        "num_nextn_predict_layers": 0,
        "first_k_dense_replace": min(count, cfg.first_k_dense_replace),
    }
    left_out = pluralize(len(source.tensors) - len(small.tensors), "tensor")
    small.notes = [
        *source.notes,
        f"converted only the first {count} of {cfg.num_hidden_layers} layers, without MTP: {left_out} left out",
    ]
    return small


def _layer_of(name: str) -> int:
    """Return the layer a tensor belongs to, -1 for none."""
    match = re.match(r"model\.layers\.(\d{1,9})\.", name)
    return int(match[1]) if match else -1
