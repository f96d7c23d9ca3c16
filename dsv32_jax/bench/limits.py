"""Lower bounds of a step: how fast a device copies memory or a host reads it, and how long an all-reduce takes."""

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
from ..system.host import count_cores
from .measure import measure_median

MAX_BUFFER = 256 << 20


def measure_copy_speed(mesh: Mesh | None) -> float:
    """Return the bytes a second that a device reads and writes while copying."""
    run, nbytes = make_copy(mesh)
    return nbytes / measure_median(run, 0.5).wall


def make_copy(mesh: Mesh | None) -> tuple[Callable[[], Any], int]:
    """Return a function that copies memory on every device, and the bytes each one reads and writes."""
    size = (1 << 30) if jax.default_backend() == "gpu" else (1 << 27)
    devices = 1 if mesh is None else mesh.size
    sharding = None if mesh is None else jax.NamedSharding(mesh, jax.P(tuple(mesh.axis_names)))
    x = jax.jit(lambda: jnp.zeros(size * devices // 4, jnp.uint32), out_shardings=sharding)()
    copy = jax.jit(lambda x: x + 1)
    return lambda: jax.block_until_ready(copy(x)), 2 * size


def make_reader(nbytes: int) -> Callable[[], Any]:
    """Return a function that reads `nbytes` of memory and adds them up on all cores: no computation is faster.

    It goes over a buffer larger than caches as often as needed, so it takes little memory.
    """
    threads = count_cores()
    buffer = np.ones(max(1, min(nbytes, MAX_BUFFER) // 8), np.uint64)
    passes, rest = divmod(nbytes // 8, buffer.size)
    parts = [part for piece in [*[buffer] * passes, buffer[:rest]] for part in np.array_split(piece, threads)]
    pool = ThreadPoolExecutor(threads)
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
