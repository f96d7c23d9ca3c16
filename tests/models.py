"""Models with random weights, made in memory."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.config import Config
from dsv32_jax.layout import Leaf, leaves
from dsv32_jax.model.model import Model, build
from dsv32_jax.quantization import formats, quantize

PLAIN = ("embed_VD", "head_VD", "router_ED", "w_w_ID", "w_e_AD", "w_h_AD", "w_uk_HNC", "w_uv_HPC")
"""Matrices that checkpoints leave in bfloat16, or that `load` dequantizes."""


def random_model(cfg: Config, *, storage: str = "dense", dtype=jnp.float32, seed: int = 0) -> Model:
    """A model of `cfg` whose leaves depend on the seed and their path alone; `storage`: "dense", "nvfp4" or "fp8"."""
    table = {leaf.path: leaf for leaf in leaves(cfg)}

    def leaf(path: str) -> formats.Weight:
        w = random_leaf(table[path], seed)
        if w.ndim < 2 or path.endswith(PLAIN) or storage == "dense":
            return w
        return quantized(w, storage, stacked=table[path].stacked)

    return build(cfg, dtype, leaf)


def random_leaf(leaf: Leaf, seed: int) -> jax.Array:
    """Gains near 1, biases near 0, matrices that keep the scale of what they multiply; peaked logits."""
    rng = np.random.default_rng([seed, zlib.crc32(leaf.path.encode())])
    noise = rng.standard_normal(leaf.shape, np.float32)
    if len(leaf.letters) == 1:
        return jnp.asarray(0.1 * noise + (0 if "bias" in leaf.path else 1))
    gain = 3.0 if "head" in leaf.path else 1.0
    return jnp.asarray(noise * gain * leaf.shape[-1] ** -0.5)


def quantized(w: jax.Array, storage: str, *, stacked: bool = False) -> formats.Weight:
    """`w` in `storage`; where it is `stacked` along its first axis, matrix by matrix."""
    matrices = np.asarray(w).reshape(len(w) if stacked else 1, -1, w.shape[-1])
    scalars = (len(w) if stacked else 1, *[1] * (w.ndim - 1))
    if storage == "fp8":
        values, grids = zip(*map(quantize.fp8_quantize, matrices), strict=True)
        scales = [np.repeat(grid, quantize.FP8_BLOCK, axis=0)[: matrices.shape[1]] for grid in grids]
        return formats.Fp8Block(_shaped(values, w.shape), _shaped(scales, w.shape))
    codes, scales, tensor_scales = zip(*map(quantize.nvfp4_quantize, matrices), strict=True)
    tensor_scale = jnp.asarray(np.stack(tensor_scales).reshape(scalars))
    return formats.NVFP4(_shaped(codes, w.shape), _shaped(scales, w.shape), tensor_scale)


def _shaped(parts, shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(np.stack(parts).reshape(*shape[:-1], -1))


def abstract(cfg: Config, dtype=jnp.float32) -> Model:
    """A model of shapes alone, as a dense checkpoint in `dtype` would fill them."""
    table = {leaf.path: leaf for leaf in leaves(cfg)}
    return build(cfg, dtype, lambda path: jax.ShapeDtypeStruct(table[path].shape, dtype))


def tokens(cfg: Config, batch: int, count: int, seed: int = 0) -> np.ndarray:
    """Random token ids [batch, count], none of them special."""
    return np.random.default_rng(seed).integers(3, cfg.vocab_size, (batch, count), dtype=np.int32)
