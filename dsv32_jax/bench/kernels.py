"""`dsv32 bench kernels`: products with stored weights at the true shapes, by the model's kernels and by XLA alone.

A time is that of one matrix of a bank larger than caches, beside a plain read of memory (on a GPU: a copy).
"""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np

from ..checkpoint.random_weights import random_bank, uniform
from ..config import Config
from ..kernels import VARIABLE, dispatch
from ..quantization.formats import Weight, dequantize
from ..system.compilation import require_device
from .measure import Row, measure_fastest, measure_median, print_rows
from .roofline import make_move

EXPLANATION = """\
A product of M rows with one matrix [out, in], cycling through the matrices of a bank; activations in bfloat16. us:
microseconds. GB/s: of packed weight bytes. limit: GB/s at which memory is {verb} in the same run. TFLOP/s: 2 M in out
over the time. error: norm of the difference from float64 over the norm. auto: what the model uses, which beyond some
rows is XLA on a CPU; xla: XLA alone. Products and the limit run in turn, and times are the fastest of many, as other
load on the machine only adds to them."""

ROWS = (1, 2, 4, 8, 16, 64, 256)
IMPLEMENTATIONS = ("auto", "xla")
"""Values of the environment variable that chooses kernels."""

BANK = {"cpu": 64 << 20, "gpu": 512 << 20}
"""Bytes that no cache holds."""

REPEATS = {"cpu": 1, "gpu": 8}
"""Calls in flight at once, so that a GPU does not wait for the host."""

SECONDS = 0.5
"""Time spent on repeats of a product."""

MAX_SECONDS = 20.0
"""The time of one call beyond which larger M are skipped."""


class Shape(NamedTuple):
    """A matrix of the model."""

    name: str
    out: int
    size: int


COLUMNS = (
    ("weight", 22, lambda row: row["weight"]),
    ("by", 8, lambda row: row["by"]),
    ("M", 4, lambda row: str(row["rows"])),
    ("us", 10, lambda row: f"{row['seconds'] * 1e6:.1f}"),
    ("GB/s", 8, lambda row: f"{row['bytes'] / row['seconds'] / 1e9:.1f}"),
    ("limit", 8, lambda row: f"{row['limit'] / 1e9:.1f}"),
    ("of limit", 8, lambda row: f"{row['bytes'] / row['seconds'] / row['limit']:.1%}"),
    ("TFLOP/s", 8, lambda row: f"{row['operations'] / row['seconds'] / 1e12:.3f}"),
    ("error", 8, lambda row: f"{row['error']:.1e}"),
)


def run(arguments: argparse.Namespace) -> None:
    """Print the table for the weights, formats, rows and implementations that are asked for."""
    from .. import configs

    require_device()
    shapes = list_shapes(Config.from_json(configs.path("deepseek_v32")))
    chosen = [shape for shape in shapes if not arguments.weight or shape.name in arguments.weight]
    formats, counts, by = arguments.format or ["nvfp4"], arguments.rows or ROWS, arguments.by or IMPLEMENTATIONS
    explanation = EXPLANATION.format(verb="copied" if jax.default_backend() == "gpu" else "read")
    print_rows(explanation, COLUMNS, measure_kernels(chosen, formats, counts, by), arguments.json)


def list_shapes(cfg: Config) -> list[Shape]:
    """Return the matrices from which a step reads most bytes."""
    hidden, latent = cfg.hidden_size, cfg.q_lora_rank
    heads, head = cfg.num_attention_heads, cfg.qk_nope_head_dim
    return [
        Shape("expert-up", cfg.moe_intermediate_size, hidden),
        Shape("expert-down", hidden, cfg.moe_intermediate_size),
        Shape("dense-up", cfg.intermediate_size, hidden),
        Shape("query-down", latent, hidden),
        Shape("query-up", heads * head, latent),
        Shape("output", hidden, heads * cfg.v_head_dim),
    ]


def measure_kernels(
    shapes: Sequence[Shape], formats: Sequence[str], counts: Sequence[int], by: Sequence[str]
) -> Iterator[Row]:
    """Yield a row for each format, shape, implementation and number of rows."""
    for format in formats:
        for shape in shapes:
            many = max(2, BANK[jax.default_backend()] // (shape.out * shape.size // 2))
            bank = random_bank((many, shape.out, shape.size), format, 0)
            for name in by:
                yield from _measure(f"{shape.name} {format}", name, bank, counts)


def _measure(weight: str, by: str, bank: Any, counts: Sequence[int]) -> Iterator[Row]:
    many, out, size = bank.shape
    move, moved = make_move(None)
    runs: dict[Any, Callable[[], Any]] = {"memory": move}
    errors: dict[int, float] = {}
    for count in counts:
        x = uniform((many, count, size), "bfloat16", jnp.uint32(count), 0.0, 1.0)
        runs[count], result = _make_product(by, x, bank)
        errors[count] = _compute_error(result, x, bank)
        if measure_median(runs[count], 0).wall > MAX_SECONDS:
            break
    times = measure_fastest(runs, SECONDS * len(errors))
    for count, error in errors.items():
        yield {
            "weight": weight,
            "by": by,
            "rows": count,
            "seconds": times[count].wall / REPEATS[jax.default_backend()] / many,
            "bytes": sum(array.nbytes for array in jax.tree.leaves(bank)) / many,
            "limit": moved / times["memory"].wall,
            "operations": 2 * count * out * size,
            "error": error,
        }


def _make_product(by: str, x: jax.Array, bank: Weight) -> tuple[Callable[[], Any], np.ndarray]:
    """Return a function that multiplies x [n, b, z] with a bank of n matrices REPEATS times, and the first result."""
    with patch.dict(os.environ, {VARIABLE: by}):
        expert = jnp.arange(len(x), dtype=jnp.int32)
        program = jax.jit(lambda *operands: dispatch.multiply_blocks(*operands)).lower(x, expert, bank).compile()
    repeats = range(REPEATS[jax.default_backend()])
    run = lambda: jax.block_until_ready([program(x, expert, bank) for _ in repeats])  # noqa: E731
    return run, np.asarray(program(x, expert, bank)[0])


def _compute_error(result: np.ndarray, x: jax.Array, bank: Weight) -> float:
    """Return the error of the first matrix's product relative to float64."""
    first = jax.tree.map(lambda array: array[0], bank)
    want = np.asarray(x[0], np.float64) @ np.asarray(dequantize(first, jnp.float32), np.float64).T
    return float(np.linalg.norm(result - want) / np.linalg.norm(want))
