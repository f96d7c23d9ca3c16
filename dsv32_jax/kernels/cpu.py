"""The kernels of src/, which the package build compiled, called through XLA's foreign function interface.

They read weights as the checkpoint stores them and multiply in float32 (with AVX-512 in bfloat16, where activations
are); an installation without a compiler has none.
"""

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import jax
import jax.numpy as jnp

from ..quantization.formats import NVFP4, Fp8Block, Weight
from ..quantization.quantize import FP8_BLOCK

NVFP4_DOT, FP8_DOT, BF16_DOT, BF16_COLUMNS = "dsv32_nvfp4_dot", "dsv32_fp8_dot", "dsv32_bf16_dot", "dsv32_bf16_columns"

SMALLEST_BLOCK = 1
"""Rows that are multiplied in the time of one."""

SMALLEST_WIDTH = 16
"""Inputs that share a block scale; other formats have multiples of it."""

MOST_ROWS, MOST_ROWS_FP8 = 128, 64
"""Beyond, decoding a matrix again for every eight rows costs more than XLA's dequantizing it once to memory."""


def compiled() -> Path | None:
    """The library that the package build made."""
    found = (Path(__file__).with_name("_cpu" + suffix) for suffix in EXTENSION_SUFFIXES)
    return next((file for file in found if file.exists()), None)


@cache
def missing() -> str:
    """Why there are no kernels; nothing where there are, which are then registered with XLA."""
    file = compiled()
    if file is None:
        return "the package was built without a C++ compiler; install it again where there is one (g++ or clang)"
    try:
        library = ctypes.CDLL(str(file))
        for symbol in (NVFP4_DOT, FP8_DOT, BF16_DOT, BF16_COLUMNS):
            jax.ffi.register_ffi_target(symbol, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    except (OSError, AttributeError, jax.errors.JaxRuntimeError) as error:
        return f"{file.name} does not load ({error}); build the package again for this Python and JAX"
    return ""


def description() -> str:
    """Which instructions the kernels use here."""
    library = ctypes.CDLL(str(compiled()))
    library.dsv32_instructions.restype = ctypes.c_char_p
    return f"C++ with {library.dsv32_instructions().decode()}, XLA for the rest"


def serves(w: Weight, rows: int) -> bool:
    """Whether there is a kernel for `rows` rows and the format of `w` [..., o, z] that is faster than XLA's product."""
    match w:
        case NVFP4():
            return w.shape[-1] % (SMALLEST_WIDTH * w.block_scale.shape[-1]) == 0 and rows <= MOST_ROWS
        case Fp8Block():
            return w.shape[-1] % FP8_BLOCK == 0 and rows <= MOST_ROWS_FP8
        case _:
            return w.dtype == jnp.bfloat16 and rows <= MOST_ROWS


def blocks(x: jax.Array, expert: jax.Array, bank: Weight, devices: int = 1) -> jax.Array:
    """`reference.blocks` without the tensor scale; it makes no difference over how many devices experts are spread."""
    match bank:
        case NVFP4():
            return _call(NVFP4_DOT, bank.shape[1], x, expert, bank.codes, bank.block_scale)
        case Fp8Block():
            return _call(FP8_DOT, bank.shape[1], x, expert, bank.values, bank.block_scale)
        case _:
            return _call(BF16_DOT, bank.shape[1], x, expert, bank)


def columns(x: jax.Array, bank: jax.Array) -> jax.Array:
    """`reference.columns`."""
    return _call(BF16_COLUMNS, bank.shape[-1], x, jnp.arange(len(bank)), bank)


def _call(symbol: str, outputs: int, x: jax.Array, expert: jax.Array, *parts: jax.Array) -> jax.Array:
    result = jax.ShapeDtypeStruct((*x.shape[:2], outputs), jnp.float32)
    return jax.ffi.ffi_call(symbol, result, vmap_method="sequential")(x, expert.astype(jnp.int32), *parts)
