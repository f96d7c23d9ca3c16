"""How a weight is stored: NVFP4, FP8 in blocks, or a plain array.

**NVFP4** spends 4.5 bits a weight. An element is E2M1 (sign, 2 exponent bits, 1 mantissa bit), so it is one of

    code  0    1    2    3    4    5    6    7        codes 8..15 are the same with a minus sign
    value 0   0.5   1   1.5   2    3    4    6

Two elements share a byte, the first in the low nibble. Every 16 neighbours on the input axis share a float8_e4m3fn
scale, and the whole matrix a float32 one. Two levels, because E4M3 alone spans too little: the float32 scale puts
the largest block at 448, the block scales keep the others within 6 % of their ideal.

e2m1 x e4m3 has 6 significant bits and is exact in bfloat16 and float32; only the product with the tensor scale
rounds, once. ModelOpt writes a NaN scale where its tensor scale was too small: it stands for 448, the largest.

**FP8** is float8_e4m3fn with a float32 scale for each 128x128 block, which multiplies. We keep one scale for each
row and 128 inputs, because cutting q_b into heads of 128 + 64 rows does not respect blocks of 128 rows. The value is
rounded to bfloat16, as DeepSeek's own dequantization does (exact when the scales are powers of two, as V3.2's are).

A plain array is its own format. Formats are storage: arithmetic is bfloat16 or float32. Every component of a weight has
the weight's own rank, so cutting, stacking and sharding are the same for all of them.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from .quantize import E4M3_MAX, FP8_BLOCK, fp8_quantize, nvfp4_quantize


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NVFP4:
    """A weight of logical shape [..., K], K being the input axis, the one that products contract.

    codes         uint8          [..., K // 2]    element 2i in the low nibble of byte i
    block_scale   float8_e4m3fn  [..., K // 16]   (K // 32 and other even divisions exist)
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
    """The plain array that `w` stores, in `dtype`. Exact in float32."""
    match w:
        case NVFP4():
            return _nvfp4(w).astype(dtype)
        case Fp8Block():
            return _fp8(w).astype(dtype)
        case _:
            return w.astype(dtype)


def exact(w: Weight, dtype) -> tuple[jax.Array, jax.Array]:
    """`w` as values * scale, the values exact in `dtype`, bfloat16 or float32.

    Of NVFP4 the scale is the tensor's, which joins in float32 where products have been summed; of others it is 1.
    """
    if isinstance(w, NVFP4):
        return _blocks(w).astype(dtype), w.tensor_scale
    return dequantize(w, dtype), jnp.ones((), jnp.float32)


def _nvfp4(w: NVFP4) -> jax.Array:
    """float32 values."""
    return _blocks(w) * w.tensor_scale


@jax.jit
def _blocks(w: NVFP4) -> jax.Array:
    """float32 values but for the tensor scale. The bitcast of a byte gives two elements, the low nibble first."""
    blocks = jax.lax.bitcast_convert_type(w.codes, jnp.float4_e2m1fn).reshape(*w.block_scale.shape, -1)
    scale = w.block_scale.astype(jnp.float32)
    scale = jnp.where(jnp.isnan(scale), E4M3_MAX, scale)
    return (blocks.astype(jnp.float32) * scale[..., None]).reshape(w.shape)


@jax.jit
def _fp8(w: Fp8Block) -> jax.Array:
    """float32 values with the precision of bfloat16 (a cast there and back may be optimized away). The last block of a
    row may be partial."""
    step = jnp.repeat(w.block_scale, FP8_BLOCK, axis=-1)[..., : w.shape[-1]]
    return jax.lax.reduce_precision(w.values.astype(jnp.float32) * step, exponent_bits=8, mantissa_bits=7)


def quantize_nvfp4(w: jax.Array) -> NVFP4:
    """The matrix `w` [..., K] in NVFP4, rounded to nearest with ties to the even code. Runs on the host.

    Raises ValueError where K is no multiple of 16 or a value is not finite.
    """
    return NVFP4(*map(jnp.asarray, nvfp4_quantize(np.asarray(w))))


def quantize_fp8(w: jax.Array) -> Fp8Block:
    """The matrix `w` [out, K] in FP8 with power-of-two scales. Runs on the host; raises ValueError as above."""
    values, grid = fp8_quantize(np.asarray(w))
    row_scale = np.repeat(grid, FP8_BLOCK, axis=0)[: values.shape[0]]
    return Fp8Block(jnp.asarray(values), jnp.asarray(row_scale))
