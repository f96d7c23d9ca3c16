"""Relative errors ||e|| / ||w|| of weights and of outputs, in float32. Squares are made on the device, errors of them
on the host; a pair of squares is that of the error and that of what it is relative to."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..config import Config
from ..model.block import Block
from ..model.cache import LayerCache
from ..model.experts import each_expert
from ..model.moe import MoE, Routing
from ..model.ops import rms_norm
from ..quantization.formats import NVFP4, Fp8Block, Weight, dequantize

Squares = tuple[jax.Array, jax.Array]

BANKS = ("ffn.w_gate_EMD", "ffn.w_up_EMD", "ffn.w_down_EDM")
"""The matrices of routed experts."""


def relative(squares: Iterable) -> float | None:
    """||error|| / ||size||. Of what is zero in both it is 0, of what is zero only in the first it is None."""
    error, size = map(float, squares)
    return (error / size) ** 0.5 if size else None if error else 0.0


def squares(a: jax.Array, b: jax.Array) -> Squares:
    """Of the difference of two arrays, and of the first."""
    return _square(b - a), _square(a)


def weights(a: Any, b: Any) -> dict[str, np.ndarray]:
    """The squares of each leaf of a part of the model, by its path within the part: [2, n], for n entries of its first
    axis, which is that of experts where they are stacked."""
    named, _ = jax.tree_util.tree_flatten_with_path(a, is_leaf=_is_weight)
    pairs = [*zip((leaf for _, leaf in named), jax.tree.leaves(b, is_leaf=_is_weight), strict=True)]
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in named]
    return {name: np.stack(squares) for name, squares in zip(names, _weights_jit(pairs), strict=True)}


def of_leaves(weights: dict[str, np.ndarray]) -> dict[str, float | None]:
    """The relative error of each leaf."""
    return {name: relative(squares.sum(axis=1)) for name, squares in weights.items()}


def of_experts(weights: dict[str, np.ndarray]) -> list[float | None]:
    """The relative error of each routed expert's matrices together; none in a dense layer."""
    banks = [squares for name, squares in weights.items() if name.endswith(BANKS)]
    return [relative(pair) for pair in np.sum(banks, axis=0).T] if banks else []


def of_outputs(squares: dict[str, Squares]) -> dict[str, float | None]:
    """The relative errors of named outputs."""
    return {name: relative(pair) for name, pair in squares.items()}


def of_expert_outputs(squares: Squares) -> list[float | None]:
    """The relative error of each expert's outputs; None where it has none."""
    return [relative(pair) if pair[1] else None for pair in np.stack(squares).T]


@jax.jit
def outputs(
    a: Block, b: Block, x_BTD: jax.Array, cache: LayerCache, position_BT: jax.Array
) -> tuple[jax.Array, dict[str, Squares], Squares | tuple[()]]:
    """The stream after `a`; squares of what attention and feed-forward add to it; those of each expert, [E], if any."""
    (_, _, seen), (_, _, other) = (block.observe(x_BTD, cache, position_BT) for block in (a, b))
    mid_BTD = x_BTD + seen.attention_BTD
    inputs = [rms_norm(mid_BTD, block.ffn_norm_D, a.cfg.rms_norm_eps) for block in (a, b)]
    (f_BTD, routing), (g_BTD, _) = (block.ffn(h_BTD) for block, h_BTD in zip((a, b), inputs, strict=True))
    found = {"attention": squares(seen.attention_BTD, other.attention_BTD), "feed-forward": squares(f_BTD, g_BTD)}
    experts = ()
    if routing is not None and isinstance(a.ffn, MoE) and isinstance(b.ffn, MoE):
        y_tXD, z_tXD = (_each(moe, h_BTD, routing) for moe, h_BTD in zip((a.ffn, b.ffn), inputs, strict=True))
        experts = _by_expert(z_tXD - y_tXD, routing, a.cfg), _by_expert(y_tXD, routing, a.cfg)
    return mid_BTD + f_BTD, found, experts


def _each(moe: MoE, h_BTD: jax.Array, routing: Routing) -> jax.Array:
    """What each of a token's experts makes of it, [t, X, D]."""
    h_tD = h_BTD.reshape(-1, h_BTD.shape[-1])
    expert_tX = routing.expert_BTX.reshape(len(h_tD), -1)
    return each_expert(h_tD, expert_tX, moe.w_gate_EMD, moe.w_up_EMD, moe.w_down_EDM)


def _by_expert(y_tXD: jax.Array, routing: Routing, cfg: Config) -> jax.Array:
    """The squares [E] of what each expert made."""
    square_tX = jnp.square(y_tXD).sum(axis=-1)
    return jax.ops.segment_sum(square_tX.reshape(-1), routing.expert_BTX.reshape(-1), cfg.n_routed_experts)


@jax.jit
def _weights_jit(pairs: list[tuple[Weight, Weight]]) -> list[Squares]:
    """Nothing dequantized is kept: it goes straight into the sums."""

    def entries(x: jax.Array) -> jax.Array:
        rows = jnp.square(x).sum(axis=-1, keepdims=x.ndim == 1)
        return rows.sum(axis=tuple(range(1, rows.ndim)))

    plain = [(dequantize(a, jnp.float32), dequantize(b, jnp.float32)) for a, b in pairs]
    return [(entries(b - a), entries(a)) for a, b in plain]


def _square(x: jax.Array) -> jax.Array:
    """The sum of squares, row by row: more exact than in one go."""
    return jnp.square(x).sum(axis=-1).sum()


def _is_weight(node: Any) -> bool:
    return isinstance(node, NVFP4 | Fp8Block | jax.Array)
