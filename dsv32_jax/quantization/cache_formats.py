"""The storage of cached vectors: float32, or the bits of bfloat16 or FP8 as unsigned integers.

XLA's CPU backend has no arithmetic below 32 bits: to update or gather from an array of such floats it converts all of
it to float32 and back. It does not convert integers.

**FP8** is DeepSeek's: E4M3 values and a float32 scale for each tile of 128. A scale is the power of two that brings the
tile's largest magnitude (at least 1e-4) to 448 or below, so value * scale is exact in bfloat16. A latent of 512 takes
512 + 4 * 4 bytes, an index key of 128 takes 128 + 4 (`act_quant` of DeepSeek's inference code with ue8m0 scales).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .quantize import E4M3_MAX

TILE = 128
SMALLEST_AMAX = 1e-4


@dataclasses.dataclass(frozen=True)
class _Bits:
    """Vectors of n values of `dtype`, as unsigned integers `bits` [..., n]."""

    dtype: ClassVar[np.dtype]
    bits: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the vectors."""
        return self.bits.shape

    @property
    def values(self) -> jax.Array:
        """Floats of `dtype` [..., n]; those of FP8 are without their scale."""
        return jax.lax.bitcast_convert_type(self.bits, self.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bf16Rows(_Bits):
    """Vectors in bfloat16: `bits` uint16."""

    dtype = np.dtype(jnp.bfloat16)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Rows(_Bits):
    """Vectors in FP8: `bits` uint8, `scale` float32 [..., ceil(n / 128)]."""

    dtype = np.dtype(jnp.float8_e4m3fn)
    scale: jax.Array


Rows = jax.Array | Bf16Rows | Fp8Rows
"""Vectors in float32, bfloat16 or FP8. Indexing the leading axes of every component selects the same vectors."""


def empty(shape: tuple[int, ...], dtype) -> Rows:
    """Return zeros, stored as float32, bfloat16 or float8_e4m3fn."""
    if dtype == jnp.bfloat16:
        return Bf16Rows(jnp.zeros(shape, jnp.uint16))
    if dtype == jnp.float8_e4m3fn:
        return Fp8Rows(jnp.zeros(shape, jnp.uint8), jnp.zeros((*shape[:-1], -(-shape[-1] // TILE)), jnp.float32))
    return jnp.zeros(shape, dtype)


def encode_like(like: Rows, x: jax.Array) -> Rows:
    """Return `x` in the storage of `like`, rounded to nearest, ties to even."""
    match like:
        case Bf16Rows():
            return Bf16Rows(jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16))
        case Fp8Rows():
            return quantize(x)
        case _:
            return x.astype(like.dtype)


def quantize(x: jax.Array) -> Fp8Rows:
    """Return `x` in FP8, rounded to nearest, ties to even."""
    tiles = _tiles(x.astype(jnp.float32))
    amax = jnp.maximum(jnp.max(jnp.abs(tiles), axis=-1, keepdims=True), SMALLEST_AMAX)
    scale = _power_of_two_above(amax / E4M3_MAX)
    values = jnp.clip(tiles / scale, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)
    bits = jax.lax.bitcast_convert_type(values, jnp.uint8)
    return Fp8Rows(bits.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]], scale[..., 0])


def read(rows: Rows, dtype) -> jax.Array:
    """Return the vectors in `dtype`."""
    match rows:
        case Bf16Rows():
            return rows.values.astype(dtype)
        case Fp8Rows():
            tiles = _tiles(rows.values.astype(jnp.float32)) * rows.scale[..., None]
            return tiles.reshape(*rows.shape[:-1], -1)[..., : rows.shape[-1]].astype(dtype)
        case _:
            return rows.astype(dtype)


def read_at(rows: Rows, slot_BTk: jax.Array, dtype) -> jax.Array:
    """Return the vectors in the given slots of all pages [pages, slots, n], in `dtype` [B, T, k, n], and those of any
    slot for -1; no others are read."""
    at_BTk = jnp.maximum(slot_BTk, 0)
    return read(jax.tree.map(lambda x: x.reshape(-1, x.shape[-1])[at_BTk], rows), dtype)


def _tiles(x: jax.Array) -> jax.Array:
    """Reshape [..., n] to [..., tiles, 128], or to a single shorter tile; the last one is padded with zeros."""
    size = min(TILE, x.shape[-1])
    rest = -x.shape[-1] % size
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, rest)]).reshape(*x.shape[:-1], -1, size)


def _power_of_two_above(x: jax.Array) -> jax.Array:
    """Return the smallest power of two not below positive `x`, from its bits, because log2 would round."""
    fraction, exponent = jnp.frexp(x)
    return jnp.ldexp(jnp.ones_like(x), exponent - (fraction == 0.5).astype(exponent.dtype))
