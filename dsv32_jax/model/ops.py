"""The arithmetic of the model. Functions of arrays without a suffix work on the last axis."""

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


@partial(jax.jit, static_argnames="spec", inline=True)
def einsum32(spec: str, x: jax.Array, w: Weight) -> jax.Array:
    """Return the product of `x` with a weight in any format: multiplied in x's dtype, accumulated in float32.

    A norm, rotation or activation that follows is computed in float32 too, and rounded once, at its end. The letters
    of `spec` are those of the arrays' names; on a mesh they say how it is sharded. A shard_map outside of a jit would
    be compiled again at each call.
    """
    return shard_product(spec, partial(dispatch.einsum, spec))(x, w)


def einsum(spec: str, x: jax.Array, w: Weight) -> jax.Array:
    """Return `einsum32` rounded to x's dtype."""
    return einsum32(spec, x, w).astype(x.dtype)


@partial(jax.jit, inline=True)
def look_up(token_BT: jax.Array, embed_VD: jax.Array) -> jax.Array:
    """Return the embedding of each token, float32 [B, T, D].

    If V is sharded, each device contributes the rows it has and zeros, which are added up: for a lookup, XLA's GPU
    compiler would gather the whole matrix on every device.
    """
    vocabulary = len(embed_VD)

    def local(token_BT, embed_vD):
        own = len(embed_vD)
        first = jax.lax.axis_index("model") * own if own < vocabulary else 0
        there = embed_vD.at[token_BT - first]
        return there.get(mode="fill", fill_value=0, wrap_negative_indices=False).astype(jnp.float32)

    return shard_product("BT,VD->BTD", local)(token_BT, embed_VD)


def rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """Return x / rms(x) * gain, computed in float32 and rounded once, as in DeepSeek's inference code."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (gain.astype(jnp.float32) * normed).astype(x.dtype)


def layer_norm(x: jax.Array, gain: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Return LayerNorm of x with the biased variance, computed in float32 and rounded once."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    return (gain.astype(jnp.float32) * normed + bias.astype(jnp.float32)).astype(x.dtype)


Product = Callable[[jax.Array, Weight], jax.Array]
"""A float32 product with a weight: an `einsum32`, or the product of blocks with their own experts."""


@jax.named_scope("feed-forward")
def swiglu(x: jax.Array, w_gate: Weight, w_up: Weight, w_down: Weight, up: Product, down: Product) -> jax.Array:
    """Return down(silu(gate(x)) * up(x)) in float32, rounded once, before `down`."""
    return down((jax.nn.silu(up(x, w_gate)) * up(x, w_up)).astype(x.dtype), w_down)


def rope_frequencies(cfg: Config) -> np.ndarray:
    """Return the angle per position of each pair, float32 [R / 2], with YaRN (arXiv 2309.00071, eq. 23) if configured.

    Every step is rounded to float32 as in the table the model was trained with: one rounding more or less changes the
    angle at position 163839 by 0.003. The power is correctly rounded, which NumPy's float32 power is not.
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
    """Return cos and sin of each position's angles, float32 [B, T, R / 2], for MLA and the indexer."""
    angle = position_BT.astype(jnp.float32)[..., None] * rope_frequencies(cfg)
    return jnp.cos(angle), jnp.sin(angle)


def rotate_interleaved(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the pairs (x[2j], x[2j+1]), which is MLA's convention."""
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def rotate_halves(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the pairs (x[j], x[j + R/2]) of the first R elements only, which is the indexer's convention."""
    half = cos.shape[-1]
    first, second = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., 2 * half :]], axis=-1)


def hadamard(x: jax.Array) -> jax.Array:
    """Return the orthonormal Walsh-Hadamard transform (Sylvester's order), computed in float32, rounded once."""
    size = x.shape[-1]
    bits = np.bitwise_count(np.arange(size)[:, None] & np.arange(size)[None, :])
    signs = np.where(bits % 2, np.float32(-1), np.float32(1))
    return (dot("...j,ij->...i", x.astype(jnp.float32), jnp.asarray(signs)) * np.float32(size**-0.5)).astype(x.dtype)


def map_tokens(f, arrays: tuple[jax.Array, ...], block: int):
    """Return f(*arrays), computed for `block` tokens at a time so that temporary arrays stay small.

    `arrays` and results are [B, T, ...], and f treats tokens independently.
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
