"""The plan of `bench model`, and the memory it takes of devices and host: said, and refused, before it is made."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ..checkpoint import host_split
from ..config import Config
from ..errors import CapacityError, UsageError, argument, listing, pluralize
from ..generation import memory
from ..generation.programs import bucket, chunk_size
from ..layout import leaves
from ..model.cache import dtype_of
from ..parallel import sharding
from ..system import host
from ..system.compilation import require_device
from .decode_step import count_weight_bytes

STEPS = {"cpu": 8, "gpu": 64}
"""Decode steps of a call: about as long as `generate` stays on the device. With experts in host memory as on a CPU."""

HOST_SHARE = 0.97
"""The share of free host memory that experts may take; programs, staging buffers and the system need the rest."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The model, its mesh, batch sizes, contexts, dtype of caches, decode steps a call, and how many MoE layers have
    their experts in host memory."""

    cfg: Config
    mesh: Mesh | None
    batches: Sequence[int]
    contexts: Sequence[int]
    cache_dtype: np.dtype
    steps: int
    host_layers: int

    @property
    def capacity(self) -> int:
        """Slots of every row that decodes."""
        return bucket(max(self.contexts) + self.steps)

    @property
    def read_capacity(self) -> int:
        """Slots of the row that reads a chunk behind each context."""
        return bucket(max(self.contexts) + chunk_size())

    @property
    def host(self) -> frozenset[str]:
        """The paths of the weights in host memory."""
        table = {leaf.path: leaf for leaf in leaves(self.cfg)}
        return frozenset(host_split.list_experts(self.cfg, table, 0, self.host_layers))


class Budget(NamedTuple):
    """Bytes of weights and of caches on each device, and free there; of experts in host memory, and free there. A layer
    that is sent to a GPU to read a chunk counts as a cache."""

    weights: int
    caches: int
    free: int
    host: int
    host_free: int

    @property
    def fits(self) -> bool:
        """Whether there is room for all."""
        on_device = self.weights + self.caches / memory.CACHE_SHARE
        return on_device <= self.free and self.host <= HOST_SHARE * self.host_free


def make_plan(
    config: str | None,
    layers: int | None,
    mesh: str | None,
    batches: Sequence[int],
    contexts: Sequence[int],
    cache_dtype: str,
    steps: int | None,
    experts: str = "device",
) -> Plan:
    """Check the options. Raises UsageError, ConfigError, and CapacityError if the devices cannot hold the weights."""
    from .. import configs

    cfg = Config.from_json(config or configs.path("deepseek_v32"))
    if layers is not None:
        dense = min(cfg.first_k_dense_replace, max(layers - 1, 0))
        cfg = dataclasses.replace(cfg, num_hidden_layers=layers, first_k_dense_replace=dense)
    cfg = dataclasses.replace(cfg, num_nextn_predict_layers=0)
    require_device()
    devices = None if mesh is None else sharding.mesh(mesh)
    table = {leaf.path: leaf for leaf in leaves(cfg)}
    host_layers = host_split.choose(cfg, table, count_weight_bytes(cfg, devices), experts, devices)
    if steps is None:
        steps = STEPS["cpu" if host_layers else jax.default_backend()]
    if small := [number for number in (*batches, *contexts, steps) if number < 1]:
        raise UsageError(f"batches, contexts and steps are 1 or more, not {listing(small)}; nothing was made")
    return Plan(cfg, devices, batches, contexts, dtype_of(cache_dtype, None), steps, host_layers)


def require_room(plan: Plan, host_memory: int | None = None) -> Budget:
    """Return what the plan takes, where `host_memory` bytes of the host are free, by default as the system says. Raises
    CapacityError if that does not fit, with the fewest layers in host memory that do."""
    found = make_budget(plan, host_memory)
    if found.fits:
        return found
    moe_layers = plan.cfg.num_hidden_layers - plan.cfg.first_k_dense_replace
    splits = (dataclasses.replace(plan, host_layers=count) for count in range(moe_layers + 1))
    fitting = [split.host_layers for split in splits if make_budget(split, host_memory).fits]
    in_host = f", and {found.host / 1e9:.1f} of {found.host_free / 1e9:.1f} GB of host memory" if found.host else ""
    other = "fewer layers, rows or tokens of context, or more devices"
    raise CapacityError(
        f"{pluralize(plan.cfg.num_hidden_layers, 'layer')} need {found.weights / 1e9:.1f} GB for weights and "
        f"{found.caches / 1e9:.1f} GB for the caches of {pluralize(max(plan.batches), 'row')} on each device, but "
        f"{found.free / 1e9:.1f} GB are free, of which caches take at most {memory.CACHE_SHARE:.0%}{in_host}; nothing "
        f"was made. Use {argument('experts', f'host:{fitting[0]}') if fitting else other}"
    )


def make_budget(plan: Plan, host_memory: int | None = None) -> Budget:
    """Return what the plan takes. Devices that are CPUs have what the experts in host memory leave."""
    cfg, mesh, host_paths = plan.cfg, plan.mesh, plan.host
    sizes = {} if mesh is None else dict(mesh.shape)
    devices, on_cpu = math.prod(sizes.values()), jax.default_backend() == "cpu"
    held = sum(size for path, size in count_weight_bytes(cfg, mesh).items() if path not in host_paths)
    in_host = sum(size for path, size in count_weight_bytes(cfg, None).items() if path in host_paths)
    sent = 0 if on_cpu else in_host // max(1, plan.host_layers) // sizes.get("expert", 1)
    caches = [
        memory.count_local_rows(batch, sizes.get("data", 1)) * _row_bytes(plan, plan.capacity) for batch in plan.batches
    ]
    caches.append(_row_bytes(plan, plan.read_capacity) + sent)
    free = memory.get_free_memory(devices) - on_cpu * in_host // devices
    return Budget(held, max(caches), free, in_host, host.get_free_memory() if host_memory is None else host_memory)


def _row_bytes(plan: Plan, slots: int) -> int:
    return memory.compute_row_bytes(plan.cfg, slots, plan.cache_dtype, 0)
