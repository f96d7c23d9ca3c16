"""The arithmetic every part of the model uses. `einsum` is the one place that asks how a weight is stored.

Generic functions take unsuffixed arrays: the last axis is the one they work on.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ..config import Config
from ..kernels import dispatch
from ..kernels.reference import dot
from ..parallel.sharding import shard_product
from ..quantization.formats import Weight


def einsum32(spec: str, x: jax.Array, w: Weight) -> jax.Array:
    """Return the product of `x` with a weight in any format: multiplied in x's dtype, accumulated in float32.

    A norm, rotation or activation that follows is computed in float32 too, and rounded once, at its end. The letters
    of `spec` are those of the arrays' names; on a mesh they say how it is sharded.
    """
    return shard_product(spec, partial(dispatch.einsum, spec))(x, w)


def einsum(spec: str, x: jax.Array, w: Weight) -> jax.Array:
    """`einsum32`, rounded to x's dtype."""
    return einsum32(spec, x, w).astype(x.dtype)


def rows_of(token_BT: jax.Array, embed_VD: jax.Array) -> jax.Array:
    """The row of each token, float32 [B, T, D].

    Where V is split, a device gives the rows that it has and zeros for the others, which are added up: to look up a
    single token XLA's GPU compiler would gather the whole matrix.
    """
    vocabulary = len(embed_VD)

    def local(token_BT, embed_vD):
        own = len(embed_vD)
        first = jax.lax.axis_index("model") * own if own < vocabulary else 0
        there = embed_vD.at[token_BT - first]
        return there.get(mode="fill", fill_value=0, wrap_negative_indices=False).astype(jnp.float32)

    return shard_product("BT,VD->BTD", local)(token_BT, embed_VD)


def rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * gain: computed in float32 and rounded once, at the end, as DeepSeek's inference code does."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (gain.astype(jnp.float32) * normed).astype(x.dtype)


def layer_norm(x: jax.Array, gain: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """LayerNorm with the biased variance: computed in float32 and rounded once, at the end."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    return (gain.astype(jnp.float32) * normed + bias.astype(jnp.float32)).astype(x.dtype)


Product = Callable[[jax.Array, Weight], jax.Array]
"""A float32 product with one weight: an `einsum32` of some letters, or that of each token's own expert."""


@jax.named_scope("feed-forward")
def swiglu(x: jax.Array, w_gate: Weight, w_up: Weight, w_down: Weight, up: Product, down: Product) -> jax.Array:
    """down(silu(gate(x)) * up(x)), float32 out: the dense feed-forward and each expert. Rounded once, before down."""
    return down((jax.nn.silu(up(x, w_gate)) * up(x, w_up)).astype(x.dtype), w_down)


def rope_frequencies(cfg: Config) -> np.ndarray:
    """Angle per position of each pair, float32 [R / 2]; stretched by YaRN (arXiv 2309.00071, eq. 23) if configured.

    Computed in float32 step by step like the reference's table, with which the model was trained: one rounding more or
    less turns position 163839 by 0.003. (The power is the correctly rounded one; NumPy's own float32 power is not.)
    """
    size = cfg.qk_rope_head_dim
    pair = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    frequency = np.float32(1) / (cfg.rope_theta ** pair.astype(np.float64)).astype(np.float32)
    yarn = cfg.rope_scaling
    if yarn is None:
        return frequency

    def pair_turning(rotations: float) -> float:
        length = yarn.original_max_position_embeddings
        return size * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(cfg.rope_theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), size - 1)
    width = np.float32(high - low if high > low else 0.001)
    stretched = np.clip((np.arange(size // 2, dtype=np.float32) - np.float32(low)) / width, 0, 1)
    kept = 1 - stretched
    return frequency / np.float32(yarn.factor) * (1 - kept) + frequency * kept


def rotation(position_BT: jax.Array, cfg: Config) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, R / 2] of each position's angles, float32; MLA and the indexer share them."""
    angle = position_BT.astype(jnp.float32)[..., None] * rope_frequencies(cfg)
    return jnp.cos(angle), jnp.sin(angle)


def rotate_interleaved(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the pairs (x[2j], x[2j+1]): MLA's convention."""
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def rotate_halves(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the pairs (x[j], x[j + R/2]) of the first R elements, pass the others through: the indexer's convention."""
    half = cos.shape[-1]
    first, second = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., 2 * half :]], axis=-1)


def hadamard(x: jax.Array) -> jax.Array:
    """The orthonormal Walsh-Hadamard transform of the last axis (Sylvester's order), in float32, rounded once."""
    size = x.shape[-1]
    bits = np.bitwise_count(np.arange(size)[:, None] & np.arange(size)[None, :])
    signs = np.where(bits % 2, np.float32(-1), np.float32(1))
    return (dot("...j,ij->...i", x.astype(jnp.float32), jnp.asarray(signs)) * np.float32(size**-0.5)).astype(x.dtype)


def over_tokens(f, arrays: tuple[jax.Array, ...], block: int):
    """f(*arrays), computed for `block` tokens at a time so that what f makes on its way stays small.

    `arrays` are [B, T, ...]; f must treat tokens independently; its results are [B, T, ...] again.
    """
    tokens = arrays[0].shape[1]
    if tokens <= block:
        return f(*arrays)
    count = -(-tokens // block)

    def split(x):
        padded = jnp.pad(x, [(0, 0), (0, count * block - tokens)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(x.shape[0], count, block, *x.shape[2:]), 1, 0)

    def join(y):
        return jnp.moveaxis(y, 0, 1).reshape(y.shape[1], count * block, *y.shape[3:])[:, :tokens]

    return jax.tree.map(join, jax.lax.map(lambda parts: f(*parts), tuple(split(x) for x in arrays)))
