"""The choice between kernels and the XLA reference for products with stored weights and for index scores.

A kernel is taken if the platform has one that is faster for the weight's format and the number of rows. Axes here are
those of kernels: n blocks of b rows of x, each times one matrix of a bank, with z inputs and o outputs.
"""

import logging
import math
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from ..quantization.cache_formats import Rows
from ..quantization.formats import NVFP4, Weight
from . import VARIABLE, cpu, read_choice, reference

LOG = logging.getLogger("dsv32_jax")

MAX_COLUMN_ROWS = 128
"""Rows of a head up to which `multiply_columns` has its kernel: enough for decoding."""

Kernel = Callable[..., jax.Array]


def einsum(spec: str, x: jax.Array, w: Weight) -> jax.Array:
    """Return the product of activations with one weight: multiplied in x's dtype, accumulated in float32.

    Kernels know blocks of rows: all rows are one block of a linear layer, and the rows of each head are a block where
    every head has its own matrix, [out, in] or [in, out].
    """
    left, right, out = spec.replace("->", ",").split(",")
    contracted = reference.count_contracted(left, right, out)
    rows = math.prod(size for letter, size in zip(left, x.shape, strict=True) if letter not in right)
    if not find_kernels(w, rows, x.dtype):
        return reference.einsum(spec, x, w)
    if contracted and left[:-contracted] + right[:-contracted] == out:
        return _multiply_linear(x, w, contracted)
    return _multiply_heads(_multiply_each if contracted else multiply_columns, x, w)


def _multiply_linear(x: jax.Array, w: Weight, contracted: int) -> jax.Array:
    """Return [..., out...], the last `contracted` axes of `x` and `w` being contracted."""
    before = x.shape[:-contracted]
    bank = jax.tree.map(lambda part: part.reshape(1, -1, math.prod(part.shape[-contracted:])), w)
    y_1bo = multiply_blocks(x.reshape(1, math.prod(before), -1), jnp.zeros(1, jnp.int32), bank)
    return y_1bo.reshape(*before, *w.shape[:-contracted])


def _multiply_heads(multiply: Kernel, x: jax.Array, w: Weight) -> jax.Array:
    """Return [..., H, out]: the rows of each head in x [..., H, in] are a block, which has the head's own matrix."""
    *before, heads, size = x.shape
    y_nbo = multiply(jnp.moveaxis(x, -2, 0).reshape(heads, math.prod(before), size), w)
    return jnp.moveaxis(y_nbo.reshape(heads, *before, -1), 0, -2)


def _multiply_each(x_nbz: jax.Array, bank: Weight) -> jax.Array:
    return multiply_blocks(x_nbz, jnp.arange(len(x_nbz), dtype=jnp.int32), bank)


def multiply_blocks(x_nbz: jax.Array, expert_n: jax.Array, bank: Weight, devices: int = 1) -> jax.Array:
    """Multiply block i of x by the matrix `expert_n[i]` of the bank [E, o, z]: float32 [n, b, o].

    An id outside of the bank gives zeros. If experts are spread over `devices`, most blocks have such ids; a kernel
    may cut the work accordingly, which does not change the result.
    """
    found = find_kernels(bank, x_nbz.shape[1], x_nbz.dtype)
    kernels = {platform: _apply_tensor_scale(partial(kernel, devices=devices)) for platform, kernel in found.items()}
    product = differentiable(reference.multiply_blocks, kernels) if kernels else reference.multiply_blocks
    return product(x_nbz, expert_n, bank)


def multiply_columns(x_nbz: jax.Array, bank_nzo: jax.Array) -> jax.Array:
    """Multiply block i of x by matrix i of the bank, which is stored as [in, out]: float32 [n, b, o]."""
    rows = x_nbz.shape[1]
    if rows > MAX_COLUMN_ROWS or not find_kernels(bank_nzo, rows, x_nbz.dtype):
        return reference.multiply_columns(x_nbz, bank_nzo)
    return differentiable(reference.multiply_columns, {"cpu": cpu.multiply_columns})(x_nbz, bank_nzo)


def index_scores(q_BTIJ: jax.Array, w_BTI: jax.Array, k_BSJ: jax.Array) -> jax.Array:
    """Return the indexer's scores [B, T, S] in float32; on a CPU a few heads at a time if there are many."""
    if w_BTI.size * k_BSJ.shape[1] <= cpu.MAX_INDEX_MATCHES:
        return reference.index_scores(q_BTIJ, w_BTI, k_BSJ)
    return jax.lax.platform_dependent(q_BTIJ, w_BTI, k_BSJ, cpu=cpu.index_scores, default=reference.index_scores)


def find_sparse_attention(dtype, rows: tuple[Rows, ...], sizes: tuple[int, ...]) -> ModuleType | None:
    """Return the module with the kernels `index_scores`, `select_topk` and `attend` for queries of this dtype and cache
    rows with vectors of these sizes, or None."""
    platform, kernels = _platform()
    if platform != "cuda" or read_choice() == "xla" or kernels.find_obstacle():
        return None
    from . import gpu_attention

    return gpu_attention if gpu_attention.supports(dtype, rows, sizes) else None


def find_attend(dtype: Any, rows: tuple[Rows, ...], sizes: tuple[int, ...]) -> dict[str, Kernel]:
    """Return the kernel of sparse attention under the name of JAX's default platform, or nothing."""
    if kernels := find_sparse_attention(dtype, rows, sizes):
        return {"cuda": kernels.attend}
    return {"cpu": cpu.attend} if _has_cpu_kernels() else {}


def find_selection() -> dict[str, Kernel]:
    """Return the kernel of top-k selection under the name of JAX's default platform, or nothing."""
    if kernels := find_sparse_attention(jnp.bfloat16, (), ()):
        return {"cuda": kernels.select_topk}
    return {"cpu": cpu.select_topk} if _has_cpu_kernels() else {}


def limit_block(*banks: Weight) -> tuple[int, int]:
    """Return the least and the most rows that a block should have if it is multiplied by matrices of these banks."""
    if all(find_kernels(bank, 1) for bank in banks):
        return _platform()[1].BLOCK
    return reference.BLOCK


def describe() -> str:
    """Describe what multiplies on this machine."""
    if read_choice() == "xla":
        return f"XLA only ({VARIABLE}=xla)"
    _, kernels = _platform()
    obstacle = kernels.find_obstacle()
    return f"XLA only, which is slow: {obstacle}" if obstacle else kernels.describe()


def find_kernels(w: Weight, rows: int, dtype: Any = jnp.bfloat16) -> dict[str, Kernel]:
    """Return the kernel for `rows` rows of this dtype and the format and shape of `w` under the name of JAX's default
    platform, or nothing. A program for another platform takes the reference."""
    platform, kernels = _platform()
    if read_choice() == "xla" or not kernels.supports(w, rows, dtype):
        return {}
    if obstacle := kernels.find_obstacle():
        _warn_slow(obstacle)
        return {}
    return {platform: kernels.multiply_blocks}


def _platform() -> tuple[str, ModuleType]:
    """Return the platform and its kernels; those for GPUs are not imported without one."""
    if jax.default_backend() != "gpu":
        return "cpu", cpu
    from . import gpu_products

    return "cuda", gpu_products


def _has_cpu_kernels() -> bool:
    return _platform()[0] == "cpu" and read_choice() != "xla" and not cpu.find_obstacle()


@cache
def _warn_slow(obstacle: str) -> None:
    """Warn once in a process."""
    LOG.warning("products with stored weights are slow without kernels: %s", obstacle)


def _apply_tensor_scale(kernel: Kernel) -> Kernel:
    """Multiply what the kernel returns by the tensor scale of each block's matrix."""

    def run(x, expert, bank):
        y = kernel(x, expert, bank)
        if not isinstance(bank, NVFP4):
            return y
        scales = bank.tensor_scale.reshape(-1)
        return y * scales[jnp.clip(expert, 0, len(scales) - 1)][:, None, None]

    return run


def differentiable(reference: Kernel, kernels: dict[str, Kernel]) -> Kernel:
    """Return the kernel of the platform the program is compiled for, with the derivative of the reference."""

    @jax.custom_jvp
    def product(*operands):
        return jax.lax.platform_dependent(*operands, **kernels, default=reference)

    @product.defjvp
    def _(primals, tangents):
        return product(*primals), jax.jvp(reference, primals, tangents)[1]

    return product
