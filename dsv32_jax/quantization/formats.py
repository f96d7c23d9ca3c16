"""The formats of stored weights: NVFP4, FP8 in blocks, and plain arrays.

**NVFP4** takes 4.5 bits a weight. An element is E2M1 (sign, 2 exponent bits, 1 mantissa bit), so it is one of

    code  0    1    2    3    4    5    6    7        codes 8..15 are the same with a minus sign
    value 0   0.5   1   1.5   2    3    4    6

Two elements share a byte, the first in the low nibble. Every 16 neighbours on the input axis share a float8_e4m3fn
scale, and the whole matrix a float32 one. There are two levels because the range of E4M3 is small: the float32 scale
puts the largest block at 448, and the block scales keep the others within 6 % of their ideal.

e2m1 x e4m3 has 6 significant bits and is exact in bfloat16 and float32; only the product with the tensor scale
rounds, once. If its tensor scale is too small ModelOpt writes a NaN block scale, which stands for 448, the largest.

**FP8** is float8_e4m3fn with a float32 scale for each 128x128 block, which multiplies. It is stored as one scale for
each row and 128 inputs, because q_b is cut into heads of 128 + 64 rows, across blocks. Values are rounded to bfloat16
as in DeepSeek's dequantization, which is exact if scales are powers of two, as V3.2's are.

Formats are storage; arithmetic is bfloat16 or float32. Every component of a weight has the rank of the weight, so
cutting, stacking and sharding are the same for all of them.
"""

import dataclasses

import jax
import jax.numpy as jnp

from .quantize import E4M3_MAX, FP8_BLOCK


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NVFP4:
    """A weight of logical shape [..., K]; K is the input axis, which products contract.

    codes         uint8          [..., K // 2]    element 2i in the low nibble of byte i
    block_scale   float8_e4m3fn  [..., K // 16]   (other even divisions exist)
    tensor_scale  float32        [1, ..., 1]      or [E, 1, ..., 1]: one for each stacked matrix

    w[..., k] = e2m1(codes)[..., k] * block_scale[..., k // 16] * tensor_scale
    """

    codes: jax.Array
    block_scale: jax.Array
    tensor_scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        return (*self.codes.shape[:-1], 2 * self.codes.shape[-1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Block:
    """A weight of logical shape [..., K] in DeepSeek's FP8.

    values        float8_e4m3fn  [..., K]
    block_scale   float32        [..., ceil(K / 128)]   of each row, repeated from the 128x128 grid

    w[..., k] = bfloat16(values[..., k] * block_scale[..., k // 128])
    """

    values: jax.Array
    block_scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        return self.values.shape


Weight = jax.Array | NVFP4 | Fp8Block


def dequantize(w: Weight, dtype) -> jax.Array:
    """Return the values of `w` in `dtype`, exact in float32."""
    match w:
        case NVFP4():
            return _nvfp4(w).astype(dtype)
        case Fp8Block():
            return _fp8(w).astype(dtype)
        case _:
            return w.astype(dtype)


def split_scale(w: Weight, dtype) -> tuple[jax.Array, jax.Array]:
    """Split `w` into values, which are exact in bfloat16 and float32, and a scale.

    The scale is the tensor scale of NVFP4, which multiplies sums of products in float32; for other formats it is 1.
    """
    if isinstance(w, NVFP4):
        return _blocks(w).astype(dtype), w.tensor_scale
    return dequantize(w, dtype), jnp.ones((), jnp.float32)


def _nvfp4(w: NVFP4) -> jax.Array:
    return _blocks(w) * w.tensor_scale


@jax.jit
def _blocks(w: NVFP4) -> jax.Array:
    """Return float32 values without the tensor scale. A byte is bitcast to two elements, the low nibble first."""
    blocks = jax.lax.bitcast_convert_type(w.codes, jnp.float4_e2m1fn).reshape(*w.block_scale.shape, -1)
    scale = w.block_scale.astype(jnp.float32)
    scale = jnp.where(jnp.isnan(scale), E4M3_MAX, scale)
    return (blocks.astype(jnp.float32) * scale[..., None]).reshape(w.shape)


@jax.jit
def _fp8(w: Fp8Block) -> jax.Array:
    """Return float32 values with the precision of bfloat16; a cast there and back might be optimized away. The last
    block of a row may be partial."""
    step = jnp.repeat(w.block_scale, FP8_BLOCK, axis=-1)[..., : w.shape[-1]]
    return jax.lax.reduce_precision(w.values.astype(jnp.float32) * step, exponent_bits=8, mantissa_bits=7)
