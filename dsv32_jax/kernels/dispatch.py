"""Which code multiplies by a stored weight: a kernel of the platform, or XLA's own products of `reference`.

The environment variable DSV32_KERNELS, read when a program is traced, can say "xla": the reference everywhere.
"""

import logging
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType

import jax
import jax.numpy as jnp

from ..quantization.cache_formats import Rows
from ..quantization.formats import NVFP4, Weight
from . import cpu, reference
from .variable import VARIABLE, asked

LOG = logging.getLogger("dsv32_jax")

FEW = 128
"""Rows of a head up to which `columns` has its kernel: those of decoding."""

Kernel = Callable[..., jax.Array]


def kernels(w: Weight, rows: int) -> dict[str, Kernel]:
    """By platform, the kernel for `rows` rows and the format and shape of `w`, where there is one: at most that of the
    platform that JAX computes on by default."""
    platform, room = _room()
    if asked() == "xla" or not room.serves(w, rows):
        return {}
    if room.missing():
        _say(room.missing())
        return {}
    return {platform: room.blocks}


def _room() -> tuple[str, ModuleType]:
    """The platform and its kernels; those for GPUs are not imported where there is none."""
    if jax.default_backend() != "gpu":
        return "cpu", cpu
    from . import gpu

    return "cuda", gpu


@cache
def _say(why: str) -> None:
    """Once, where a stored weight is multiplied."""
    LOG.warning("products with stored weights are slow here, without kernels: %s", why)


def description() -> str:
    """What multiplies on this machine, for people."""
    if asked() == "xla":
        return f"XLA alone ({VARIABLE}=xla)"
    _, room = _room()
    return f"XLA alone, which is slow: {room.missing()}" if room.missing() else room.description()


def smallest_block() -> int:
    """Rows of different tokens that a kernel multiplies in the time of one."""
    _, room = _room()
    return 1 if asked() == "xla" or room.missing() else room.SMALLEST_BLOCK


def blocks(x_nbz: jax.Array, expert_n: jax.Array, bank: Weight, devices: int = 1) -> jax.Array:
    """Block i of b rows times the transposed matrix `expert_n[i]` of the bank [E, o, z]: float32 [n, b, o].

    An id that is no expert stands for no matrix, and makes zeros. Where the experts are spread over `devices`, about
    one block in so many has an expert here; it decides nothing but how the work is cut.
    """
    there = kernels(bank, x_nbz.shape[1])
    found = {platform: _scaled(partial(kernel, devices=devices)) for platform, kernel in there.items()}
    product = differentiable(reference.blocks, found) if found else reference.blocks
    return product(x_nbz, expert_n, bank)


def columns(x_nbz: jax.Array, bank_nzo: jax.Array) -> jax.Array:
    """Block i of a few rows times the plain matrix i of the bank, which lies the other way: float32 [n, b, o]."""
    if x_nbz.shape[1] > FEW or not kernels(bank_nzo, x_nbz.shape[1]):
        return reference.columns(x_nbz, bank_nzo)
    return differentiable(reference.columns, {"cpu": cpu.columns})(x_nbz, bank_nzo)


def sparse_attention(dtype, rows: tuple[Rows, ...], sizes: tuple[int, ...]) -> ModuleType | None:
    """Return the module with the kernels `index_scores`, `select_topk` and `attend` for queries of this dtype and cache
    rows with vectors of these sizes; None where XLA computes the references."""
    platform, room = _room()
    if platform != "cuda" or asked() == "xla" or room.missing():
        return None
    from . import gpu_attention

    return gpu_attention if gpu_attention.serves(dtype, rows, sizes) else None


def _scaled(kernel: Callable) -> Callable:
    """`kernel`, and the tensor scale of each block's matrix."""

    def run(x, expert, bank):
        y = kernel(x, expert, bank)
        if not isinstance(bank, NVFP4):
            return y
        scales = bank.tensor_scale.reshape(-1)
        return y * scales[jnp.clip(expert, 0, len(scales) - 1)][:, None, None]

    return run


def differentiable(reference: Callable, found: dict[str, Callable]) -> Callable:
    """The kernel of the platform that the program is compiled for; its derivative is that of the reference."""

    @jax.custom_jvp
    def product(*operands):
        return jax.lax.platform_dependent(*operands, **found, default=reference)

    @product.defjvp
    def _(primals, tangents):
        return product(*primals), jax.jvp(reference, primals, tangents)[1]

    return product
