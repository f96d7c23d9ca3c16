"""A Triton kernel as a call that XLA can make a part of a CUDA graph.

jax_triton compiles a kernel and makes a call of it in XLA's older interface, which graphs cannot hold. jaxlib has the
same call in the newer one, with a stage of its own in which kernels are loaded; what it is told, a compressed protocol
buffer, is the same.
"""

import contextvars
import importlib
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import jax

TARGET = "triton_kernel_call_ffi"


def launch(kernel: Any, out: Any, *operands: jax.Array, **how: Any) -> Any:
    """Return `jax_triton.triton_call` of `kernel`; `out` is one shape or several, `how` a grid and constants."""
    shapes = tuple(jax.ShapeDtypeStruct(operand.shape, operand.dtype) for operand in operands)
    compiled = _compiled(kernel, out, shapes, tuple(sorted(how.items())))
    return jax.ffi.ffi_call(TARGET, out)(*operands, opaque=compiled)


@cache
def _compiled(kernel: Any, out: Any, shapes: tuple[jax.ShapeDtypeStruct, ...], how: tuple) -> bytes:
    """What jax_triton tells jaxlib: the kernel in machine code, and how to launch it.

    It is made while another program is traced, of whose time it is a part: in a context of its own nobody counts it
    twice.
    """
    jax_triton: Any = importlib.import_module("jax_triton")
    call = jax.jit(partial(jax_triton.triton_call, kernel=kernel, out_shape=out, **dict(how)))
    lowered = contextvars.Context().run(lambda: call.trace(*shapes).lower(lowering_platforms=("cuda",)))
    program: Any = lowered.compiler_ir("stablehlo")
    (made,) = (op for op in _operations(program.operation) if op.name == "stablehlo.custom_call")
    return made.attributes["backend_config"].value_bytes


def _operations(op: Any) -> Iterator[Any]:
    """All operations within `op`."""
    for region in op.regions:
        for block in region:
            for inner in block:
                yield inner.operation
                yield from _operations(inner.operation)
