"""Sparse attention on NVIDIA GPUs: how the kernels of `triton_attention` are launched.

Measured on an H100 at the real sizes (index_topk 2048, 128 heads, latents of 512): scoring 131,072 keys for one query
takes 15 us, for 2,048 queries 9.7 ms (450 TFLOP/s). Selecting takes 28 us for one query of 131,072 keys, and 0.5 ms for
2,048 of 34,816. Attending takes 4.9 ms for 2,048 queries (235 TFLOP/s).
"""

import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp

from ..quantization.cache_formats import Bf16Rows, Fp8Rows, Rows
from .triton_launch import launch

SLOTS_SCORED, QUERIES_SCORED = 128, 32
SLOTS_OF_ONE, TILES_OF_ONE = 128, 4
SAMPLE, CANDIDATES, BLOCK = 8192, 4096, 4096
HEADS, SLOTS = 64, 64
MULTIPROCESSORS = 132


def supports(dtype: Any, rows: tuple[Rows, ...], sizes: tuple[int, ...]) -> bool:
    """Return whether there are kernels: for bfloat16 queries, bfloat16 or FP8 rows, and powers of two as sizes."""
    stored = all(isinstance(one, Bf16Rows | Fp8Rows) for one in rows)
    return stored and dtype == jnp.bfloat16 and all(size >= 16 and size & (size - 1) == 0 for size in sizes)


def index_scores(
    q_BTIJ: jax.Array, w_BTI: jax.Array, k_yqJ: Rows, table_Bd: jax.Array | None, position_BT: jax.Array
) -> jax.Array:
    """Return the index scores [B, T, S] in float32, -inf behind each query's position."""
    batch, tokens, heads, width = q_BTIJ.shape
    table_Bd = jnp.arange(batch, dtype=jnp.int32)[:, None] if table_Bd is None else table_Bd
    page, blocks, queries = k_yqJ.shape[1], table_Bd.shape[1], min(tokens, QUERIES_SCORED)
    slots = page * blocks
    values, scale, fp8 = _split(k_yqJ, w_BTI)
    if tokens == 1:
        name, own = "index_scores_of_one_kernel", {"SLOTS": SLOTS_OF_ONE, "TILES": TILES_OF_ONE}
        grid = (-(-slots // (SLOTS_OF_ONE * TILES_OF_ONE)), batch, 1)
    else:
        name, own = "index_scores_kernel", {"SLOTS": SLOTS_SCORED, "T": tokens, "QUERIES": queries}
        grid = (-(-slots // SLOTS_SCORED), batch * -(-tokens // queries), 1)
    return launch(
        _kernel(name),
        jax.ShapeDtypeStruct((batch, tokens, slots), jnp.float32),
        *(q_BTIJ, w_BTI, values, scale, table_Bd, position_BT),
        grid=grid,
        num_warps=4,
        num_stages=3 if tokens == 1 else 2,
        **{"S": slots, "HEADS": heads, "J": width, "FP8": fp8, "PAGE": page, "BLOCKS": blocks, **own},
    )


def select_topk(score_BTS: jax.Array, position_BT: jax.Array, topk: int) -> jax.Array:
    """Return the positions [B, T, topk] of the largest scores of each query, then -1. A few long rows are searched by
    several programs each."""
    batch, tokens, slots = score_BTS.shape
    rows, size = batch * tokens, max(CANDIDATES, 1 << (2 * topk - 1).bit_length())
    blocks = -(-slots // BLOCK)
    each = BLOCK * -(-blocks // min(blocks, max(1, MULTIPROCESSORS // rows)))
    parts = -(-slots // each)
    sizes = {"S": slots, "K": topk, "SIZE": size, "BLOCK": BLOCK, "PARTS": parts, "ROOM": min(each, size)}
    found, count = launch(
        _kernel("collect_kernel"),
        (
            jax.ShapeDtypeStruct((rows, parts, min(each, size)), jnp.int32),
            jax.ShapeDtypeStruct((rows, parts), jnp.int32),
        ),
        *(score_BTS, position_BT),
        grid=(rows, parts, 1),
        num_warps=8,
        num_stages=2,
        **{**sizes, "SAMPLE": SAMPLE, "EACH": each},
    )
    _, selected_BTk = launch(
        _kernel("select_kernel"),
        (
            jax.ShapeDtypeStruct((rows, max(2, 1 << (parts - 1).bit_length())), jnp.int32),
            jax.ShapeDtypeStruct((batch, tokens, topk), jnp.int32),
        ),
        *(score_BTS, position_BT, found, count),
        grid=(rows, 1, 1),
        num_warps=8,
        num_stages=2,
        **sizes,
    )
    return selected_BTk


def attend(
    softmax_scale: float,
    q_c_BTHC: jax.Array,
    q_r_BTHR: jax.Array,
    c_kv_yqC: Rows,
    k_r_yqR: Rows,
    slot_BTk: jax.Array,
    position_BT: jax.Array,
) -> jax.Array:
    """Return each head's weighted sum of the latents in its slots, [B, T, H, C] in the queries' dtype.

    In `slot_BTk` at most position + 1 slots come first, then -1. If there are few queries, their slots are split over
    several programs, whose results are combined.
    """
    batch, tokens, heads, latent = q_c_BTHC.shape
    queries, count = batch * tokens, slot_BTk.shape[-1]
    programs = queries * -(-heads // HEADS)
    each = SLOTS * -(-count // (SLOTS * min(max(1, MULTIPROCESSORS // programs), -(-count // SLOTS))))
    parts = -(-count // each)
    values, scale, fp8 = _split(c_kv_yqC, q_r_BTHR)
    out, norm = launch(
        _kernel("sparse_attention_kernel"),
        (
            jax.ShapeDtypeStruct((parts, batch, tokens, heads, latent), q_c_BTHC.dtype if parts == 1 else jnp.float32),
            jax.ShapeDtypeStruct((parts, batch, tokens, heads), jnp.float32),
        ),
        *(q_c_BTHC, q_r_BTHR, slot_BTk, position_BT, values, scale, _split(k_r_yqR, q_r_BTHR)[0]),
        grid=(-(-heads // HEADS), queries, parts),
        num_warps=8,
        num_stages=2,
        SOFTMAX_SCALE=softmax_scale / math.log(2),
        **{"G": queries, "K": count, "H": heads, "C": latent},
        **{"R": q_r_BTHR.shape[-1], "FP8": fp8, "EACH": each, "HEADS": HEADS, "SLOTS": SLOTS},
    )
    if parts == 1:
        return out[0]
    share = jax.nn.softmax(norm * math.log(2), axis=0)
    return jnp.sum(out * share[..., None], axis=0).astype(q_c_BTHC.dtype)


def _split(rows: Rows, unused: jax.Array) -> tuple[jax.Array, jax.Array, bool]:
    """Return the bits of cache rows, their scales (`unused` if there are none), and whether they are FP8."""
    if isinstance(rows, Fp8Rows):
        return rows.bits, rows.scale, True
    assert isinstance(rows, Bf16Rows)
    return rows.bits, unused, False


def _kernel(name: str) -> Any:
    """Return a kernel by its name; Triton is imported only here."""
    return getattr(importlib.import_module(".triton_attention", __package__), name)
