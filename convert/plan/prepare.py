"""What the user asks for, checked and planned: everything that can be known before a byte of a tensor is read."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from dsv32_jax.checkpoint import vocabulary
from dsv32_jax.checkpoint.manifest import digest
from dsv32_jax.config import Config
from dsv32_jax.errors import UsageError, listing, unknown
from dsv32_jax.parallel import partition
from dsv32_jax.system.files import expand_path

from ..read.layers import first_layers
from ..read.source import Source
from . import memory
from .memory import Budget
from .output import require_apart, require_companions
from .plan import Plan, PlannedLeaf, plan
from .policy import recipe


class Options(TypedDict, total=False):
    """How to convert; everything may be left out.

    to            "nvfp4", "fp8" or "bf16"; by default weights keep their format
    policy        which weights that means: a preset or a file (`policy.py`)
    scales        how NVFP4 block scales are chosen: "rtn", "mse" or "four-over-six"
    tensor_scales each matrix's "own", or "shared" by gate and up and by q_a and kv_a
    layers        "0-3": only the first layers, as a model of its own without the MTP layer
    mesh          "expert=8,model=2" or the same as a dict: chunks are cut so that a device reads its own bytes
    max_memory    bytes, or "8GiB"; by default 80 % of what is free
    workers       threads that read and convert; by default one for each core
    strict_index  refuse a source whose index does not list every tensor of its shards
    verify_source first compare every shard with the SHA-256 that `hf download` left beside it
    group_bytes   small leaves are saved together, about so many bytes at a time
    """

    to: str | None
    policy: str | Path | None
    scales: str
    tensor_scales: str
    layers: str | None
    mesh: str | Mapping[str, int] | None
    max_memory: str | int | None
    workers: int | None
    strict_index: bool
    verify_source: bool
    group_bytes: int


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A conversion that can begin. `digest` and `basis` are those of the plan, for this mesh."""

    source: Source
    dst: Path
    plan: Plan
    mesh: dict[str, int]
    budget: Budget
    group_bytes: int

    @property
    def basis(self) -> dict[str, Any]:
        """What a person can change between two runs and must not."""
        return {**self.plan.basis, "mesh": self.mesh}

    @property
    def digest(self) -> str:
        """Equal for two runs that write the same bytes, whatever memory and workers they are given."""
        return digest([self.plan.digest, self.mesh]) if self.mesh else self.plan.digest

    @functools.cached_property
    def peak(self) -> int:
        """Bytes of memory that will be taken at most."""
        return memory.peak(self.groups(list(self.plan.leaves)), self.budget)

    def groups(self, leaves: list[PlannedLeaf]) -> list[memory.Group]:
        """`leaves` as they are saved together."""
        return list(memory.groups(leaves, self.budget.limit, self.group_bytes))


def prepare(src: str | Path, dst: str | Path, options: Options) -> Prepared:
    """Read the headers of `src` and plan its conversion to `dst`. Nothing is written.

    Raises UsageError, ConfigError, CheckpointError, or CapacityError where the memory or the mesh does not do.
    """
    if wrong := unknown(options, Options.__annotations__):
        raise UsageError(f"{len(wrong)} options are not known: {listing(wrong)}; nothing was read")
    src, dst = expand_path(src).absolute(), expand_path(dst).absolute()
    kinds = (options.get("scales", "rtn"), options.get("tensor_scales", "own"))
    if kinds != ("rtn", "own") and options.get("to") != "nvfp4" and options.get("policy") is None:
        raise UsageError(
            "--scales and --tensor-scales say how weights become NVFP4, and none does: add --to nvfp4. Nothing was read"
        )
    wanted = recipe(options.get("to"), options.get("policy"), *kinds)
    budget = memory.budget(options.get("max_memory"), options.get("workers"))
    mesh = partition.optional(options.get("mesh"))
    require_apart(src, dst)
    source = Source(src)
    require_companions(src)
    if options.get("strict_index"):
        source.require_index()
    if (layers := options.get("layers")) is not None:
        source = first_layers(source, layers)
    planned = plan(source, wanted)
    vocabulary.check(src, Config.from_dict(source.config, str(src / "config.json")))
    partition.check(mesh, [(leaf.leaf, shape) for leaf in planned.leaves for _, shape in leaf.arrays.values()])
    memory.require(planned.leaves, budget.limit)
    return Prepared(source, dst, planned, mesh, budget, options.get("group_bytes", memory.GROUP_BYTES))
