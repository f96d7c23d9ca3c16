"""Random weights, generated on the device from a hash of each element's index.

`jax.random.bits` needs 6 to 16 times the memory of its result, and a host copy would double it. Here an expert bank of
6.3 GB takes 6.3 GB, and a weight is the same on whatever devices it is sharded.
"""

import functools
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ..config import Config
from ..layout import Leaf, leaves
from ..parallel.sharding import leaf_sharding
from ..quantization.formats import NVFP4, Fp8Block, Weight
from ..quantization.quantize import E2M1, FP8_BLOCK, NVFP4_BLOCK
from .random_checkpoint import is_quantized
from .weight_shapes import ABSORBED

SCALES = np.arange(0x68, 0x78, dtype=np.uint8)
"""Block scales, chosen at random: the E4M3 codes of 64, 72, ..., 240."""

GOLDEN = 0x9E3779B1
"""2^32 divided by the golden ratio: odd, so its multiples visit every 32-bit number."""


def leaf_maker(cfg: Config, dtype=jnp.bfloat16, seed: int = 0, mesh: Mesh | None = None) -> Callable[[str], Weight]:
    """Return a function for `model.build` that generates the weight of a path, in the format `load` would return.

    `dtype` is the compute dtype. A weight depends on its path, shape and `seed`; each device of `mesh` generates its
    own shard.
    """
    table = {leaf.path: leaf for leaf in leaves(cfg)}
    return lambda path: random_leaf(table[path], storage(table[path], dtype), seed, mesh)


def storage(leaf: Leaf, dtype=jnp.bfloat16) -> str:
    """Return the format of a weight in a model that computes in `dtype`: "nvfp4", or the name of a dtype."""
    if len(leaf.source_shape) == 1:
        return "float32"
    if leaf.path.endswith(ABSORBED):
        return np.dtype(dtype).name
    return "nvfp4" if is_quantized(leaf) else "bfloat16"


def random_leaf(leaf: Leaf, storage: str, seed: int, mesh: Mesh | None = None) -> Weight:
    """Generate gains near 1, biases near 0, or a matrix with a standard deviation of (number of inputs)^-0.5.

    `storage` is "nvfp4", with all codes equally likely, or the name of a dtype, with uniformly distributed values.
    """
    number = np.uint32(zlib.crc32(leaf.path.encode(), seed))
    *out, size = leaf.shape
    scalars = (leaf.shape[0] if leaf.stacked else 1, *[1] * len(out))
    parts = [(*out, size // 2), (*out, size // NVFP4_BLOCK), scalars] if storage == "nvfp4" else [leaf.shape]
    shardings = tuple(None if mesh is None else leaf_sharding(mesh, leaf, shape) for shape in parts)
    if len(leaf.source_shape) == 1:
        return uniform(leaf.shape, storage, number, 0.0 if "bias" in leaf.path else 1.0, 0.1, *shardings)
    deviation = leaf.source_shape[-1] ** -0.5
    if storage == "nvfp4":
        return _nvfp4(leaf.shape, leaf.stacked, number, deviation, shardings)
    return uniform(leaf.shape, storage, number, 0.0, deviation, *shardings)


def random_bank(shape: tuple[int, int, int], storage: str, number: int) -> Weight:
    """Generate matrices [E, out, in] with a standard deviation of in^-0.5, in "nvfp4", "fp8" or "bf16"."""
    bits, deviation = jnp.uint32(number), shape[-1] ** -0.5
    if storage == "nvfp4":
        return _nvfp4(shape, True, bits, deviation, (None,) * 3)
    values = uniform(shape, "bfloat16", bits, 0.0, deviation)
    if storage == "bf16":
        return values
    scale = jnp.full((*shape[:-1], -(-shape[-1] // FP8_BLOCK)), 2.0**-12, jnp.float32)
    return Fp8Block((values.astype(jnp.float32) * 2.0**12).astype(jnp.float8_e4m3fn), scale)


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def _nvfp4(
    shape: tuple[int, ...],
    stacked: bool,
    number: jax.Array,
    deviation: float,
    shardings: tuple[NamedSharding | None, ...],
) -> NVFP4:
    *out, size = shape
    scales = jax.lax.bitcast_convert_type(SCALES, jnp.float8_e4m3fn).astype(jnp.float32)
    tensor_scale = deviation / (np.sqrt(np.mean(E2M1**2)) * jnp.sqrt(jnp.mean(scales**2)))
    codes = hash_indices((*out, size // 2), number).astype(jnp.uint8)
    chosen = (hash_indices((*out, size // NVFP4_BLOCK), ~number) % len(SCALES)).astype(jnp.uint8)
    block_scale = jax.lax.bitcast_convert_type(SCALES[0] + chosen, jnp.float8_e4m3fn)
    parts = (codes, block_scale, jnp.full((shape[0] if stacked else 1, *[1] * len(out)), tensor_scale))
    return NVFP4(*map(_constrain, parts, shardings))


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def uniform(
    shape: tuple[int, ...],
    dtype: str,
    number: jax.Array,
    mean: float,
    deviation: float,
    sharding: NamedSharding | None = None,
) -> jax.Array:
    """Generate uniformly distributed values with this mean and standard deviation."""
    unit = hash_indices(shape, number).astype(jnp.float32) * np.float32(2**-31) - 1
    return _constrain((mean + np.float32(np.sqrt(3)) * deviation * unit).astype(dtype), sharding)


def _constrain(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


def hash_indices(shape: tuple[int, ...], number: jax.Array) -> jax.Array:
    """Hash the index of each element with `number` to 32 bits: a sum of multiples, then the last step of murmur3."""
    index = number
    for axis in range(len(shape)):
        step = np.uint32(pow(GOLDEN, axis + 1, 2**32))
        index = index + step * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    bits = (index ^ (index >> 16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
