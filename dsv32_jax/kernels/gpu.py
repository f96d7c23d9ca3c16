"""Products with quantized weights on NVIDIA GPUs: how the kernels of `triton_kernels` are launched, with jax_triton.

Letters: n blocks of b rows of x; E matrices [o, z], one of which multiplies each block.
"""

import importlib
import importlib.util
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..quantization.formats import NVFP4, Fp8Block, Weight
from ..quantization.quantize import FP8_BLOCK, NVFP4_BLOCK
from .launch import launch

SMALLEST_BLOCK = 8
"""Rows that are multiplied in the time of one."""

CAPABILITY = "9.0"
"""Of the GPUs that tiles were measured on: H100 and H200."""


class Tile(NamedTuple):
    """A program computes `out` x `rows` of y; it reads `columns` of the weight at a time, `stages` - 1 times ahead."""

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
"""The fastest of those measured on an H100, by rows. A column is a word of 8 codes."""

FP8_TILES = (
    Tile(16, 128, 8, 1, 4),
    Tile(64, 128, 16, 4, 3),
    Tile(64, 128, 32, 4, 3),
    Tile(64, 128, 64, 4, 2),
    Tile(64, 128, 128, 4, 2),
    Tile(128, 64, 256, 8, 4),
)
"""Likewise. A column is a value."""

MOST_ROWS_FLOAT32 = 64
LARGEST_WIDTH = 128
"""Elements of a block scale, in a tile of 16 words."""

SCHEDULERS = 132 * 4
"""Of warps, on an H100 or H200."""


@cache
def missing() -> str:
    """Why there are no kernels; nothing where there are."""
    if absent := [name for name in ("jax_triton", "triton") if importlib.util.find_spec(name) is None]:
        return f"{' and '.join(absent)} not installed (pip install 'dsv32-jax[gpu]')"
    found = getattr(jax.local_devices()[0], "compute_capability", None)
    if found != CAPABILITY:
        return f"they are made for GPUs of compute capability {CAPABILITY} (H100, H200), and this one's is {found}"
    return ""


def description() -> str:
    """Which kernels are used here."""
    return "Triton for quantized weights, XLA for the rest"


def serves(w: Weight, rows: int) -> bool:
    """Whether there is a kernel for the format of `w` [..., o, z]; any number of rows will do."""
    match w:
        case NVFP4():
            return w.shape[-1] % (NVFP4_BLOCK * w.block_scale.shape[-1]) == 0
        case Fp8Block():
            return w.shape[-1] % FP8_BLOCK == 0
        case _:
            return False


def blocks(x: jax.Array, expert: jax.Array, bank: Any, devices: int) -> jax.Array:
    """`reference.blocks` without the tensor scale. The experts of the blocks are spread over `devices`."""
    triton_kernels: Any = importlib.import_module(".triton_kernels", __package__)
    if isinstance(bank, Fp8Block):
        return _dot(triton_kernels.fp8_kernel, FP8_TILES, 1, x, expert, bank.values, bank.block_scale, devices)
    width, scale = x.shape[-1] // bank.block_scale.shape[-1], bank.block_scale
    if width > LARGEST_WIDTH or width & (width - 1):
        scale = jnp.repeat(scale, width // NVFP4_BLOCK, axis=-1)
    return _dot(triton_kernels.nvfp4_kernel, NVFP4_TILES, 8, x, expert, bank.codes, scale, devices)


def _dot(kernel, tiles, elements: int, x, expert, values, scale, devices: int) -> jax.Array:
    """Launch `kernel`, a column of which has so many elements."""
    if x.dtype == jnp.float32:
        tiles = [tile for tile in tiles if tile.rows <= MOST_ROWS_FLOAT32]
        parts = jnp.concatenate(_bfloat16_parts(x), axis=1)
        first, second, third = jnp.split(
            _dot(kernel, tiles, elements, parts, expert, values, scale, devices), 3, axis=1
        )
        return first + second + third
    n, b, z = x.shape
    matrices, o, _ = values.shape
    tile = next((tile for tile in tiles if tile.rows >= b), tiles[-1])
    programs = -(-b // tile.rows) * -(-o // tile.out)
    steps = -(-z // (elements * tile.columns))
    each = -(-steps // _parts(programs * -(-n // devices) * tile.warps, steps, min(13 * b, 800) / z))
    parts = -(-steps // each)
    y_pnbo = launch(
        kernel,
        jax.ShapeDtypeStruct((parts, n, b, o), jnp.float32),
        _in_planes(x, tile.columns) if elements == 8 else x,
        expert.astype(jnp.int32),
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


def _parts(warps: int, steps: int, writing: float) -> int:
    """In how many parts the sum over z is cut: two warps keep a scheduler busy, and none should get one more than most.

    `writing` is the time to write and read y, as a share of that for all products where every scheduler is busy.
    """

    def cost(parts: int) -> float:
        turns = max(2, -(-warps * parts // SCHEDULERS))
        return turns / parts * (1 + parts / 25) + parts * writing * warps / SCHEDULERS

    return min(range(1, max(2, steps // 2 + 1)), key=cost)


def _bfloat16_parts(x: jax.Array) -> list[jax.Array]:
    """Three bfloat16 arrays whose sum is the float32 array `x`."""
    parts = []
    for _ in range(3):
        part = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts


def _in_planes(x: jax.Array, columns: int) -> jax.Array:
    """x in chunks of `columns` words of 8 elements: the elements 0 of the words, then the elements 1, and so on."""
    n, b, z = x.shape
    padded = jnp.pad(x, [(0, 0), (0, 0), (0, -z % (8 * columns))])
    return padded.reshape(n, b, -1, columns, 8).swapaxes(-1, -2).reshape(n, b, -1)
