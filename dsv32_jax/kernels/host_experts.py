"""Experts in host memory: C++ of src/ applies them there, or sends their matrices to the device for many tokens.

A step gives the host its activations, the ids of matrices and the gates, and takes the outputs back. On a GPU that is
a function of the host in the device's stream.
"""

import ctypes
import weakref
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import UsageError
from ..quantization.formats import Weight
from ..quantization.host_weight import HostArrays, HostWeight, format_of
from . import cpu

MIX, FETCH = "dsv32_host_mix", "dsv32_host_fetch"

FAILED = "experts in host memory: "
"""The beginning of what the C++ says of a failure."""

FETCH_TOKENS = 256
"""From so many tokens on most experts are chosen, and sending all of them to a GPU is faster than applying them."""


@cache
def load_library() -> ctypes.CDLL:
    """Return the library, whose calls are then known to XLA. Raises UsageError if there is none."""
    if obstacle := cpu.find_obstacle():
        raise UsageError(f"experts in host memory need the C++ kernels: {obstacle}")
    library = ctypes.CDLL(str(cpu.find_library()))
    platform, suffix = ("CUDA", "gpu") if jax.default_backend() == "gpu" else ("cpu", "cpu")
    for name in (MIX, FETCH):
        handler = jax.ffi.pycapsule(getattr(library, f"{name}_{suffix}"))
        jax.ffi.register_ffi_target(name, handler, platform=platform)
    library.dsv32_host_add.argtypes = [ctypes.c_int32, *[ctypes.c_int64] * 5, *[ctypes.c_void_p] * 3]
    return library


def keep(weight: Any) -> tuple[HostArrays, int]:
    """Make the NumPy arrays of a weight [E, out, in] known to the kernels, and return them with the id of the first
    matrix. They are forgotten when nothing refers to the result."""
    library, parts = load_library(), jax.tree.leaves(weight)
    values, scales, tensor_scale = (*parts, None, None)[:3]
    experts, out, size = weight.shape
    pointers = [None if part is None else part.ctypes.data for part in (values, scales, tensor_scale)]
    arrays = HostArrays(weight)
    row_bytes, scale_bytes = (0 if part is None else part.nbytes // (experts * out) for part in (values, scales))
    first = library.dsv32_host_add(format_of(arrays), experts, out, size, row_bytes, scale_bytes, *pointers)
    weakref.finalize(arrays, library.dsv32_host_remove, first).atexit = False
    return arrays, first


def pays_to_fetch(tokens: int) -> bool:
    """Return whether the matrices should go to the tokens' device, instead of the tokens to the matrices."""
    return jax.default_backend() == "gpu" and tokens >= FETCH_TOKENS


def mix(
    h_tD: jax.Array, expert_tX: jax.Array, gate_tX: jax.Array, w_gate: HostWeight, w_up: HostWeight, w_down: HostWeight
) -> jax.Array:
    """Return the sum over x of gate[t, x] * expert[t, x](h[t]), float32 [t, D], computed on the host.

    Ids outside of the banks, and matrices that another device has, give zeros. There is no derivative.
    """
    ids = jnp.stack([_find_matrices(w, expert_tX) for w in (w_gate, w_up, w_down)])
    result = jax.ShapeDtypeStruct((len(h_tD), w_down.shape[1]), jnp.float32)
    return jax.ffi.ffi_call(MIX, result)(h_tD, ids, gate_tX.astype(jnp.float32))


def select_own(expert_tX: jax.Array, w: HostWeight) -> jax.Array:
    """Return the ids of experts whose matrices this device has, and for the others the id E, no expert."""
    return jnp.where(_find_matrices(w, expert_tX) >= 0, expert_tX, w.shape[0])


def fetch(w: HostWeight, after: jax.Array) -> Weight:
    """Return the matrices of `w` on the device, once `after` has been computed: no earlier, so that only one layer's
    are there. Those that another device has are undefined."""
    own, whole = w.shape[0], w.arrays.weight
    parts = [
        jax.ffi.ffi_call(FETCH, jax.ShapeDtypeStruct((own, *part.shape[1:]), part.dtype))(
            w.matrix.reshape(-1), after.reshape(-1)[:1], component=np.int64(i)
        )
        for i, part in enumerate(jax.tree.leaves(whole))
    ]
    return jax.tree.unflatten(jax.tree.structure(whole), parts)


def _find_matrices(w: HostWeight, expert_tX: jax.Array) -> jax.Array:
    return w.matrix.reshape(-1).at[expert_tX].get(mode="fill", fill_value=-1)


def take_error() -> str:
    """Return why experts in host memory failed in a GPU's stream since the last call, where their outputs became NaN;
    "" if they did not."""
    if not load_library.cache_info().currsize:
        return ""
    text = ctypes.create_string_buffer(1024)
    load_library().dsv32_host_error(text, ctypes.c_size_t(len(text)))
    return text.value.decode()
