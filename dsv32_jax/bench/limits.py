"""What bounds a step: how fast a device copies memory, and how long devices take to add up what they have."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..config import Config
from ..generation.batch import OPTIONS
from .measure import medians


def copy_speed(mesh: Mesh | None) -> float:
    """Bytes a second that a device reads and writes while it copies."""
    run, nbytes = copying(mesh)
    return nbytes / medians(run, 0.5).wall


def copying(mesh: Mesh | None) -> tuple[Callable[[], Any], int]:
    """What copies memory on every device, and the bytes that each reads and writes in it."""
    size = (1 << 30) if jax.default_backend() == "gpu" else (1 << 27)
    many = 1 if mesh is None else mesh.size
    spread = None if mesh is None else jax.NamedSharding(mesh, jax.P(tuple(mesh.axis_names)))
    x = jax.jit(lambda: jnp.zeros(size * many // 4, jnp.uint32), out_shardings=spread)()
    copy = jax.jit(lambda x: x + 1)
    return lambda: jax.block_until_ready(copy(x)), 2 * size


def all_reduce_latency(cfg: Config, mesh: Mesh | None, count: int = 64) -> float:
    """Seconds of an all-reduce of one row's hidden vector over the whole mesh, one of `count` after the other in a
    program that is compiled as a model is."""
    if mesh is None:
        return 0.0
    axes = tuple(mesh.axis_names)

    def reduce(x: jax.Array) -> jax.Array:
        for _ in range(count):
            x = jax.lax.psum(x, axes) / mesh.size
        return x

    spread = jax.shard_map(reduce, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)
    run = jax.jit(spread, compiler_options=OPTIONS)
    x = jnp.ones((1, cfg.hidden_size), jnp.float32)
    return medians(lambda: jax.block_until_ready(run(x)), 0.3).wall / count


def all_reduces(text: str) -> int:
    """How many a compiled program has; those of a decode program are its step's."""
    return len(re.findall(r" all-reduce(?:-start)?\(", text))
