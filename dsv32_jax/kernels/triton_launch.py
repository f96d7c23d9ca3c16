"""A Triton kernel as a call that CUDA graphs can hold.

jax_triton compiles a kernel and calls it through an older interface of XLA, which graphs cannot hold. jaxlib has the
same call in its newer interface, with a stage of its own in which kernels are loaded. It takes the same argument, a
compressed protocol buffer, which is read from the program that jax_triton makes.
"""

import contextvars
import importlib
import importlib.metadata
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import jax

from ..errors import DsvError
from . import VARIABLE

TARGET = "triton_kernel_call_ffi"
"""The name of jaxlib's call."""


def launch(kernel: Any, out: Any, *operands: jax.Array, **constants: Any) -> Any:
    """Call a Triton kernel. `out` is the shape of its result, or a tuple of several; `constants` include the grid."""
    shapes = tuple(jax.ShapeDtypeStruct(operand.shape, operand.dtype) for operand in operands)
    compiled = _compile(kernel, out, shapes, tuple(sorted(constants.items())))
    return jax.ffi.ffi_call(TARGET, out)(*operands, opaque=compiled)


@cache
def _compile(kernel: Any, out: Any, shapes: tuple[jax.ShapeDtypeStruct, ...], constants: tuple) -> bytes:
    """Return the argument of jaxlib's call: the kernel in machine code, and its launch parameters.

    A fresh context keeps the time from being counted twice, because another program is being traced meanwhile.
    """
    jax_triton: Any = importlib.import_module("jax_triton")
    call = jax.jit(partial(jax_triton.triton_call, kernel=kernel, out_shape=out, **dict(constants)))
    lowered = contextvars.Context().run(lambda: call.trace(*shapes).lower(lowering_platforms=("cuda",)))
    program: Any = lowered.compiler_ir("stablehlo")
    calls = [op for op in _walk(program.operation) if op.name == "stablehlo.custom_call"]
    configs = [op.attributes["backend_config"] for op in calls if "backend_config" in op.attributes]
    if len(calls) != 1 or len(configs) != 1 or not hasattr(configs[0], "value_bytes"):
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jax-triton"))
        raise DsvError(
            f"the compiled Triton kernel was not found in jax_triton's program ({len(calls)} custom calls, "
            f"{len(configs)} with a backend_config; expected 1): {versions} do not work together. Install the versions "
            f"of dsv32-jax[gpu], or set {VARIABLE}=xla to compute without kernels"
        )
    return configs[0].value_bytes


def _walk(op: Any) -> Iterator[Any]:
    """Yield all operations within `op`."""
    for region in op.regions:
        for block in region:
            for inner in block:
                yield inner.operation
                yield from _walk(inner.operation)
