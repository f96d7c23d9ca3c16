"""Lower bounds of a step: how fast a device moves memory, and how long an all-reduce takes."""

import collections
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..config import Config
from ..generation.programs import OPTIONS
from ..kernels.host_experts import mix
from ..model.model import Model
from ..quantization.host_weight import HostWeight, find_host_weights
from ..system.host import count_cores
from .measure import measure_median

CORE_BYTES = 64 << 20
"""Memory for each core, more than a host's caches hold: two sockets have 200 MB and more."""


def measure_move_speed(mesh: Mesh | None) -> float:
    """Return the bytes a second that a device moves at best."""
    run, nbytes = make_move(mesh)
    return nbytes / measure_median(run, 0.5).wall


def make_move(mesh: Mesh | None) -> tuple[Callable[[], Any], int]:
    """Return a function that moves memory as fast as the devices can, and the bytes each one moves: a plain read by all
    cores on CPUs, which share them, elsewhere a copy on every device, read and written."""
    devices = 1 if mesh is None else mesh.size
    if jax.default_backend() == "cpu":
        return make_reader(), count_cores() * CORE_BYTES // devices
    sharding = None if mesh is None else jax.NamedSharding(mesh, jax.P(tuple(mesh.axis_names)))
    x = jax.jit(lambda: jnp.zeros((1 << 28) * devices, jnp.uint32), out_shardings=sharding)()
    copy = jax.jit(lambda x: x + 1)
    return lambda: jax.block_until_ready(copy(x)), 2 << 30


def measure_host_speed() -> float:
    """Return the bytes a second that all cores read of host memory."""
    return count_cores() * CORE_BYTES / measure_median(make_reader(), 0.5).wall


def measure_host_call(model: Model, count: int = 16) -> float:
    """Return the seconds of a call of the host for one row that chose no expert, one of `count` in sequence."""
    bank = find_host_weights(model)[0]
    lost = HostWeight(jnp.full((1, 1, 1), -1, jnp.int32), bank.arrays)
    expert_tX, gate_tX = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1))

    @jax.jit
    def run(h_tD: jax.Array) -> jax.Array:
        for _ in range(count):
            h_tD = h_tD + mix(h_tD, expert_tX, gate_tX, lost, lost, lost)
        return h_tD

    h_tD = jnp.ones((1, bank.shape[1]), jnp.float32)
    return measure_median(lambda: jax.block_until_ready(run(h_tD)), 0.3).wall / count


def make_reader() -> Callable[[], Any]:
    """Return a function that reads CORE_BYTES of memory on each core and adds them up: no computation is faster."""
    cores = count_cores()
    pool = ThreadPoolExecutor(cores)
    parts = list(pool.map(lambda _: np.ones(CORE_BYTES // 8, np.uint64), range(cores)))  # near its core
    return lambda: collections.deque(pool.map(np.add.reduce, parts), maxlen=0)


def measure_all_reduce(cfg: Config, mesh: Mesh | None, count: int = 64) -> float:
    """Return the seconds of an all-reduce of one hidden vector over the whole mesh.

    It is one of `count` in sequence, in a program compiled with a model's options.
    """
    if mesh is None:
        return 0.0
    axes = tuple(mesh.axis_names)

    def reduce(x: jax.Array) -> jax.Array:
        for _ in range(count):
            x = jax.lax.psum(x, axes) / mesh.size
        return x

    sharded = jax.shard_map(reduce, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)
    run = jax.jit(sharded, compiler_options=OPTIONS)
    x = jnp.ones((1, cfg.hidden_size), jnp.float32)
    return measure_median(lambda: jax.block_until_ready(run(x)), 0.3).wall / count


def count_all_reduces(text: str) -> int:
    """Return how many all-reduces a compiled program contains; those of a decode program are its step's."""
    return len(re.findall(r" all-reduce(?:-start)?\(", text))
