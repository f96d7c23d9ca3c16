"""The programs that the engine runs, how XLA compiles them, and for which shapes: chunks of prompts and caches."""

import functools
import logging
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax

from ..config import Config
from ..model.model import Model
from ..quantization.host_weight import find_host_weights
from . import prefill_decode, speculative
from .prefill_decode import Generated, State

LOG = logging.getLogger("dsv32_jax")

DEEP = 40
"""Layers whose whole-model programs take about 20 s to compile on two CPU cores, which is 0.5 s a layer."""

SMALLEST_BUCKET = 16

SHORT_CHUNK = 256
"""Tokens that an accelerator reads between two decode steps, about as fast as fewer ones."""

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


def plan_chunk(unread: int, most: int) -> tuple[int, int]:
    """Return how many tokens of a row with so many unread ones are read next, and how many such rows go with it, for
    `most` tokens in all. Of a large chunk less than a third is padding."""
    size = min(chunk_size(), fill(unread, SMALLEST_BUCKET if jax.default_backend() == "cpu" else SHORT_CHUNK))
    size = min(size, 1 << (most.bit_length() - 1))
    return size, most // size


def chunk_size(rows: int = 1) -> int:
    """Return how many tokens of each of `rows` prompts are processed at once; longer ones are prefilled in chunks.

    On accelerators few rows have larger chunks: the weights are read less often, by at least 2,048 tokens.
    """
    return max(SMALLEST_BUCKET, 512 // rows) if jax.default_backend() == "cpu" else max(512, 2048 // rows)


def fill(count: int, smallest: int = 1) -> int:
    """Return the power of two that `count` fills best: the next one, or the one before if a third would be empty."""
    size = max(smallest, 1 << (count - 1).bit_length())
    return size if size == smallest or 2 * size < 3 * count else size // 2


def most_alone(rows: int) -> int:
    """Return how many tokens of so many prompts are read at once where nothing else is done."""
    return fill(rows) * chunk_size(fill(rows))


def most_beside(cfg: Config, lengths: Iterable[int], length: int) -> int:
    """Return how many tokens behind `length` are read between two decode steps of rows of these lengths: an accelerator
    reads SHORT_CHUNK; a CPU, whose time is that of its operations, as many as take about as long as two steps."""
    if jax.default_backend() != "cpu":
        return SHORT_CHUNK
    step = sum(count_operations(cfg, row) for row in lengths)
    return max(4, 2 * step // count_operations(cfg, length))


def count_operations(cfg: Config, length: int) -> int:
    """Return the multiplications of a token behind `length` others in a MoE layer."""
    attended, latents = min(length, cfg.index_topk), 2 * cfg.kv_lora_rank + cfg.qk_rope_head_dim
    projections = cfg.q_lora_rank * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim) + cfg.hidden_size * cfg.v_head_dim
    absorbed = cfg.kv_lora_rank * (cfg.qk_nope_head_dim + cfg.v_head_dim)
    heads = cfg.num_attention_heads * (projections + absorbed + attended * latents)
    indexer = cfg.index_n_heads * cfg.index_head_dim * (cfg.q_lora_rank + length)
    experts = 3 * (cfg.num_experts_per_tok + 1) * cfg.hidden_size * cfg.moe_intermediate_size
    return heads + indexer + experts


def bucket(size: int) -> int:
    """Return the next power of two, at least SMALLEST_BUCKET: many requests share the programs of its shape."""
    return max(SMALLEST_BUCKET, 1 << (int(size) - 1).bit_length())


def capacity_for(cfg: Config, tokens: int) -> int:
    """Return the capacity of a cache for rows of `tokens` tokens: a bucket, but no more than the longest context."""
    return min(bucket(tokens), cfg.max_position_embeddings)
