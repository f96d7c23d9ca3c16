"""Kernels for NVIDIA GPUs: how the products of `triton_products` are launched."""

import importlib
import importlib.util
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..quantization.formats import NVFP4, Fp8Block, Weight
from ..quantization.quantize import FP8_BLOCK, NVFP4_BLOCK
from .triton_launch import launch

BLOCK = (8, 256)
"""The rows that are multiplied in the time of one, and those of the largest tile."""

CAPABILITY = "9.0"
"""Of the GPUs that tiles were measured on: H100 and H200."""


class Tile(NamedTuple):
    """A program computes `out` x `rows` of y. It loads `columns` of the weight at a time, `stages` - 1 times ahead."""

    out: int
    columns: int
    rows: int
    warps: int
    stages: int


NVFP4_TILES = (
    Tile(16, 32, 8, 1, 4),
    Tile(64, 32, 16, 4, 3),
    Tile(64, 32, 32, 4, 3),
    Tile(64, 16, 64, 4, 3),
    Tile(64, 16, 128, 4, 3),
    Tile(128, 16, 256, 8, 3),
)
"""The fastest measured on an H100 for each number of rows. A column is a word of 8 codes."""

FP8_TILES = (
    Tile(16, 128, 8, 1, 4),
    Tile(64, 128, 16, 4, 3),
    Tile(64, 128, 32, 4, 3),
    Tile(64, 128, 64, 4, 2),
    Tile(64, 128, 128, 4, 2),
    Tile(128, 64, 256, 8, 4),
)
"""The same. A column is a value."""

MAX_ROWS_FLOAT32 = 64
"""Rows of the largest tile whose float32 activations, in three parts, fit in a program."""

MAX_SCALE_WIDTH = 128
"""Elements that share a block scale in a tile of 16 words."""

SCHEDULERS = 132 * 4
"""Warp schedulers of an H100 or H200."""


@cache
def find_obstacle() -> str:
    """Return why there are no kernels, or ""."""
    if absent := [name for name in ("jax_triton", "triton") if importlib.util.find_spec(name) is None]:
        return f"{' and '.join(absent)} not installed (pip install 'dsv32-jax[gpu]')"
    found = getattr(jax.local_devices()[0], "compute_capability", None)
    if found != CAPABILITY:
        return f"they need a GPU of compute capability {CAPABILITY} (H100, H200), and this one has {found}"
    return ""


def describe() -> str:
    """Describe the kernels."""
    return "Triton for quantized weights, XLA for the rest"


def supports(w: Weight, rows: int, dtype: Any) -> bool:
    """Return whether there is a kernel for the format of `w` [..., o, z], for any number of rows and any dtype."""
    match w:
        case NVFP4():
            return w.shape[-1] % (NVFP4_BLOCK * w.block_scale.shape[-1]) == 0
        case Fp8Block():
            return w.shape[-1] % FP8_BLOCK == 0
        case _:
            return False


def multiply_blocks(x_nbz: jax.Array, expert_n: jax.Array, bank: Any, devices: int) -> jax.Array:
    """`reference.multiply_blocks` without the tensor scale. The experts of the blocks are spread over `devices`."""
    triton_products: Any = importlib.import_module(".triton_products", __package__)
    if isinstance(bank, Fp8Block):
        return _multiply(
            triton_products.fp8_kernel, FP8_TILES, 1, x_nbz, expert_n, bank.values, bank.block_scale, devices
        )
    width, scale = x_nbz.shape[-1] // bank.block_scale.shape[-1], bank.block_scale
    if width > MAX_SCALE_WIDTH or width & (width - 1):
        scale = jnp.repeat(scale, width // NVFP4_BLOCK, axis=-1)
    return _multiply(triton_products.nvfp4_kernel, NVFP4_TILES, 8, x_nbz, expert_n, bank.codes, scale, devices)


def _multiply(kernel, tiles, elements: int, x_nbz, expert_n, values, scale, devices: int) -> jax.Array:
    """Launch `kernel`, whose columns have that many elements, on tiles that fit the rows."""
    if x_nbz.dtype == jnp.float32:
        tiles = [tile for tile in tiles if tile.rows <= MAX_ROWS_FLOAT32]
        parts_nbz = jnp.concatenate(_split_float32(x_nbz), axis=1)
        first, second, third = jnp.split(
            _multiply(kernel, tiles, elements, parts_nbz, expert_n, values, scale, devices), 3, axis=1
        )
        return first + second + third
    n, b, z = x_nbz.shape
    matrices, o, _ = values.shape
    tile = next((tile for tile in tiles if tile.rows >= b), tiles[-1])
    programs = -(-b // tile.rows) * -(-o // tile.out)
    steps = -(-z // (elements * tile.columns))
    each = -(-steps // _count_parts(programs * -(-n // devices) * tile.warps, steps, min(13 * b, 800) / z))
    parts = -(-steps // each)
    y_pnbo = launch(
        kernel,
        jax.ShapeDtypeStruct((parts, n, b, o), jnp.float32),
        _interleave(x_nbz, tile.columns) if elements == 8 else x_nbz,
        expert_n.astype(jnp.int32),
        values,
        scale,
        grid=(programs, n, parts),
        num_warps=tile.warps,
        num_stages=tile.stages,
        N=n,
        B=b,
        OUTPUTS=o,
        MATRICES=matrices,
        WIDTH=z // elements,
        SCALES=scale.shape[-1],
        STEPS=each,
        OUT=tile.out,
        COLUMNS=tile.columns,
        ROWS=tile.rows,
    )
    return jnp.sum(y_pnbo, axis=0)


def _count_parts(warps: int, steps: int, writing: float) -> int:
    """Return the number of parts in which to cut the sum over z.

    Two warps keep a scheduler busy, and none should get one more than most. `writing` is the time to write and read y
    as a share of that for all products when every scheduler is busy.
    """

    def cost(parts: int) -> float:
        turns = max(2, -(-warps * parts // SCHEDULERS))
        return turns / parts * (1 + parts / 25) + parts * writing * warps / SCHEDULERS

    return min(range(1, max(2, steps // 2 + 1)), key=cost)


def _split_float32(x: jax.Array) -> list[jax.Array]:
    """Return three bfloat16 arrays whose sum is the float32 array `x`."""
    parts = []
    for _ in range(3):
        part = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts


def _interleave(x_nbz: jax.Array, columns: int) -> jax.Array:
    """Reorder x in chunks of `columns` words of 8 elements: element 0 of each word, then element 1, and so on."""
    n, b, z = x_nbz.shape
    padded = jnp.pad(x_nbz, [(0, 0), (0, 0), (0, -z % (8 * columns))])
    return padded.reshape(n, b, -1, columns, 8).swapaxes(-1, -2).reshape(n, b, -1)
