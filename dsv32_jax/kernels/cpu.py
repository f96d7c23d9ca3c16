"""Kernels for CPUs: C++ of src/, compiled with the package and called through XLA's foreign function interface.

They read weights as the checkpoint stores them and multiply in float32, with AVX-512 BF16 in bfloat16 where activations
are. A package that was installed without a compiler has none.
"""

import ctypes
import math
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..quantization.cache_formats import Bf16Rows, Fp8Rows, Rows
from ..quantization.formats import NVFP4, Fp8Block, Weight
from ..quantization.quantize import FP8_BLOCK, NVFP4_BLOCK
from ..system import host
from . import reference

NVFP4_DOT, FP8_DOT, BF16_DOT, BF16_COLUMNS = "dsv32_nvfp4_dot", "dsv32_fp8_dot", "dsv32_bf16_dot", "dsv32_bf16_columns"
ATTENTION, SELECT = "dsv32_attention", "dsv32_select"

BLOCK = (1, 1)
"""The kernels collect the rows of a matrix from all blocks, so that none has to be filled up."""

MAX_ROWS, MAX_ROWS_FP8 = 128, 64
"""With more rows it is faster to dequantize a matrix once to memory, as XLA does, than for every eight rows: but for
NVFP4 with instructions for bfloat16."""

MAX_INDEX_MATCHES, INDEX_HEADS = 1 << 21, 4
"""With more products of query heads and keys, index scores are summed over INDEX_HEADS heads at a time."""


def find_library() -> Path | None:
    """Return the library that the package build made."""
    candidates = (Path(__file__).with_name("_cpu" + suffix) for suffix in EXTENSION_SUFFIXES)
    return next((file for file in candidates if file.exists()), None)


@cache
def find_obstacle() -> str:
    """Return why there are no kernels, or "" after registering them with XLA."""
    file = find_library()
    if file is None:
        return "the package was built without a C++ compiler; reinstall it where there is one (g++ or clang)"
    try:
        library = ctypes.CDLL(str(file))
        for symbol in (NVFP4_DOT, FP8_DOT, BF16_DOT, BF16_COLUMNS, ATTENTION, SELECT):
            jax.ffi.register_ffi_target(symbol, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    except (OSError, AttributeError, jax.errors.JaxRuntimeError) as error:
        return f"{file.name} does not load ({error}); rebuild the package for this Python and JAX"
    return ""


def describe() -> str:
    """Describe the instructions that the kernels use on this machine."""
    library = ctypes.CDLL(str(find_library()))
    library.dsv32_instructions.restype = ctypes.c_char_p
    return f"C++ with {library.dsv32_instructions().decode()}, XLA for the rest"


def supports(w: Weight, rows: int, dtype: Any) -> bool:
    """Return whether a kernel is faster than XLA's product of `rows` rows of this dtype with `w` [..., o, z]."""
    match w:
        case NVFP4():
            fast = rows <= MAX_ROWS or (dtype == jnp.bfloat16 and host.has_avx512_bf16())
            return fast and w.shape[-1] % (NVFP4_BLOCK * w.block_scale.shape[-1]) == 0
        case Fp8Block():
            return w.shape[-1] % FP8_BLOCK == 0 and rows <= MAX_ROWS_FP8
        case _:
            return w.dtype == jnp.bfloat16 and rows <= MAX_ROWS


def multiply_blocks(x_nbz: jax.Array, expert_n: jax.Array, bank: Weight, devices: int = 1) -> jax.Array:
    """`reference.multiply_blocks` without the tensor scale; the number of devices makes no difference."""
    match bank:
        case NVFP4():
            return _call(NVFP4_DOT, bank.shape[1], x_nbz, expert_n, bank.codes, bank.block_scale)
        case Fp8Block():
            return _call(FP8_DOT, bank.shape[1], x_nbz, expert_n, bank.values, bank.block_scale)
        case _:
            return _call(BF16_DOT, bank.shape[1], x_nbz, expert_n, bank)


def multiply_columns(x_nbz: jax.Array, bank_nzo: jax.Array) -> jax.Array:
    """`reference.multiply_columns`."""
    return _call(BF16_COLUMNS, bank_nzo.shape[-1], x_nbz, jnp.arange(len(bank_nzo)), bank_nzo)


def _call(symbol: str, outputs: int, x_nbz: jax.Array, expert_n: jax.Array, *parts: jax.Array) -> jax.Array:
    result = jax.ShapeDtypeStruct((*x_nbz.shape[:2], outputs), jnp.float32)
    return jax.ffi.ffi_call(symbol, result, vmap_method="sequential")(x_nbz, expert_n.astype(jnp.int32), *parts)


def index_scores(q_BTIJ: jax.Array, w_BTI: jax.Array, k_BSJ: jax.Array) -> jax.Array:
    """`reference.index_scores`, a few heads at a time: products that stay in the CPU's caches take half the time."""
    *before, heads = w_BTI.shape
    at_once = math.gcd(heads, INDEX_HEADS)
    q_gBTiJ = jnp.moveaxis(q_BTIJ.reshape(*before, -1, at_once, q_BTIJ.shape[-1]), 2, 0)
    w_gBTi = jnp.moveaxis(w_BTI.reshape(*before, -1, at_once), 2, 0)

    def add(score_BTS, group):
        q_BTiJ, w_BTi = group
        return score_BTS + reference.index_scores(q_BTiJ, w_BTi, k_BSJ), None

    zero_BTS = jnp.zeros((*before, k_BSJ.shape[1]), jnp.float32)
    return jax.lax.scan(add, zero_BTS, (q_gBTiJ, w_gBTi))[0]


def select_topk(score_BTS: jax.Array, position_BT: jax.Array, topk: int) -> jax.Array:
    """Return the positions [B, T, topk] of the largest scores of each query in rising order, then -1."""
    selected = jax.ShapeDtypeStruct((*position_BT.shape, topk), jnp.int32)
    return jax.ffi.ffi_call(SELECT, selected, vmap_method="sequential")(score_BTS, position_BT)


def attend(
    softmax_scale: float,
    q_c_BTHC: jax.Array,
    q_r_BTHR: jax.Array,
    c_kv_yqC: Rows,
    k_r_yqR: Rows,
    slot_BTk: jax.Array,
    position_BT: jax.Array,
) -> jax.Array:
    """Return each head's weighted sum of the latents in its slots, as `mla.attend_selected`."""
    none = jnp.zeros(0, jnp.float32)
    values, scale = (c_kv_yqC.bits, c_kv_yqC.scale) if isinstance(c_kv_yqC, Fp8Rows) else (_bits(c_kv_yqC), none)
    call = jax.ffi.ffi_call(ATTENTION, jax.ShapeDtypeStruct(q_c_BTHC.shape, jnp.float32), vmap_method="sequential")
    operands = (q_c_BTHC, q_r_BTHR, values, scale, _bits(k_r_yqR), slot_BTk.astype(jnp.int32))
    return call(*operands, scale=np.float32(softmax_scale / math.log(2))).astype(q_c_BTHC.dtype)


def _bits(rows: Rows) -> jax.Array:
    """Return the bits of bfloat16, or float32 itself."""
    assert not isinstance(rows, Fp8Rows)
    return rows.bits if isinstance(rows, Bf16Rows) else rows
