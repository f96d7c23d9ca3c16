"""The programs that the engine runs, which of them are chosen, and how XLA compiles them."""

import functools
import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import jax

from ..model.model import Model
from ..quantization.host_weight import find_host_weights
from . import prefill_decode, speculative
from .prefill_decode import Generated, State

LOG = logging.getLogger("dsv32_jax")

DEEP = 40
"""Layers whose whole-model programs take about 20 s to compile on two CPU cores, which is 0.5 s a layer."""

DEFAULTS = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,COLLECTIVES",
    "xla_gpu_command_buffer_scheduling_mode": "SERIALIZE",
}
"""XLA's CPU backend by default runs as much as it can side by side, and would dequantize all layers at once. On a GPU a
step runs as CUDA graphs that include kernels and all-reduces, one after the other: XLA does not see all that a Triton
kernel depends on, and beside others it read what was not written yet (jaxlib 0.11.2: NaN in one of four chunks of a
prompt). Each backend ignores the options of the other."""


def compiler_options(flags: str) -> dict[str, str]:
    """Return the compiler options of whole-model programs, except those that the user's XLA_FLAGS set."""
    return {name: value for name, value in DEFAULTS.items() if f"--{name}=" not in flags}


OPTIONS = compiler_options(os.environ.get("XLA_FLAGS", ""))


class Programs(NamedTuple):
    """The functions `prefill` and `decode` of prefill_decode.py and the parts of a step of speculative.py, as they are
    run."""

    prefill: Callable[..., State]
    decode: Callable[..., tuple[State, Generated]]
    catch_up: Callable[..., tuple[State, jax.Array, jax.Array]]
    draft: Callable[..., tuple[State, jax.Array]]
    process: Callable[..., tuple[State, jax.Array]]


PARTS = speculative.catch_up, speculative.draft, speculative.process

WHOLE = Programs(
    jax.jit(prefill_decode.prefill, donate_argnames="state", compiler_options=OPTIONS),
    jax.jit(
        prefill_decode.decode,
        static_argnames=("step", "slots", "width"),
        donate_argnames="state",
        compiler_options=OPTIONS,
    ),
    *(jax.jit(part, donate_argnames="state", compiler_options=OPTIONS) for part in PARTS),
)
"""The whole model is one program, compiled once for each bucket of shapes."""

LAYERWISE = Programs(prefill_decode.prefill, prefill_decode.decode_layerwise, *PARTS)
"""Each kind of layer is one program, called from Python: compiles in seconds, runs slower."""


def choose_programs(model: Model, layerwise: bool | None = None) -> Programs:
    """Return LAYERWISE if `layerwise`, WHOLE if not. By default whole models are compiled on accelerators, except where
    weights are in host memory; elsewhere only models of fewer than DEEP layers are."""
    if layerwise is None:
        layerwise = len(model.layers) >= DEEP and (jax.default_backend() == "cpu" or find_host_weights(model) != [])
        if layerwise:
            _tell(len(model.layers))
    return LAYERWISE if layerwise else WHOLE


@functools.cache
def _tell(layers: int) -> None:
    LOG.info("running layer by layer: %d layers take long to compile as one program", layers)
