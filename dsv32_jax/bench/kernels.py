"""`dsv32 bench kernels`: products with stored weights at the true shapes, by what the model takes, by XLA
alone, and by PyTorch if it is there.

Each time is that of one matrix out of a bank that no cache holds, against a plain read (on a GPU a copy) of memory.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..checkpoint.random_weights import random_bank, uniform
from ..config import Config
from ..kernels import dispatch
from ..kernels.variable import VARIABLE
from ..quantization.formats import NVFP4, Weight, dequantize
from ..system.compilation import require_device
from .limits import copying
from .measure import Row, in_turn, medians, reader, table

EXPLANATION = """\
One product of M rows with one matrix [out, in] of a bank that is gone through in turn, activations in bfloat16. us:
microseconds. GB/s: of packed weight bytes. limit: GB/s at which memory is {verb} meanwhile. TFLOP/s: 2 M in out over
the time. error: norm of the difference from float64 over the norm. auto: what the model multiplies with, beyond some
rows XLA on a CPU; xla: XLA alone. What one implementation does goes in turn with the limit, and times are the fastest
of many: what else a machine does only adds to them."""

ROWS = (1, 2, 4, 8, 16, 64, 256)
BANK = {"cpu": 64 << 20, "gpu": 512 << 20}
"""Bytes that no cache holds."""

REPEATS = {"cpu": 1, "gpu": 8}
"""Calls on the way at once, so that a GPU does not wait for the host."""

SECONDS = 0.5
"""For which a product is repeated."""

SLOWEST = 20.0
"""Seconds of one call beyond which larger M are left out."""


class Shape(NamedTuple):
    """A matrix of the true model."""

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


def print_kernels(formats: Sequence[str], counts: Sequence[int], only: Sequence[str], implementations: Sequence[str]):
    """`dsv32 bench kernels`."""
    from .. import configs

    require_device()
    cfg = Config.from_json(configs.path("deepseek_v32"))
    chosen = [shape for shape in shapes(cfg) if not only or shape.name in only]
    print(EXPLANATION.format(verb="copied" if jax.default_backend() == "gpu" else "read"))
    for line in table(COLUMNS, rows(chosen, formats, counts, implementations)):
        print(line, flush=True)


def shapes(cfg: Config) -> list[Shape]:
    """Where most bytes of a step are read."""
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


def memory() -> tuple[Callable[[], Any], int]:
    """What only moves memory, and the bytes it moves: on a CPU it reads, on a GPU it copies."""
    return copying(None) if jax.default_backend() == "gpu" else (reader(BANK["cpu"]), BANK["cpu"])


def rows(chosen: Sequence[Shape], formats: Sequence[str], counts: Sequence[int], by: Sequence[str]) -> Iterator[Row]:
    """A row for each format, shape, implementation and number of rows."""
    for format in formats:
        for shape in chosen:
            many = max(2, BANK[jax.default_backend()] // (shape.out * shape.size // 2))
            bank = random_bank((many, shape.out, shape.size), format, 0)
            for name in by:
                if name != "torch" or isinstance(bank, NVFP4):
                    yield from _measured(f"{shape.name} {format}", name, bank, counts)


def _measured(weight: str, by: str, bank: Any, counts: Sequence[int]) -> Iterator[Row]:
    """The rows of one implementation, whose products go in turn with a plain read or copy."""
    many, out, size = bank.shape
    move, moved = memory()
    runs: dict[Any, Callable[[], Any]] = {"memory": move}
    errors, repeats = {}, 1
    for count in counts:
        x = uniform((many, count, size), "bfloat16", jnp.uint32(count), 0.0, 1.0)
        runs[count], repeats, result = IMPLEMENTATIONS[by](x, bank)
        errors[count] = _error(result, x, bank)
        if medians(runs[count], 0).wall > SLOWEST:
            break
    times = in_turn(runs, SECONDS * len(errors))
    nbytes = sum(part.nbytes for part in jax.tree.leaves(bank)) / many
    for count, error in errors.items():
        yield {
            "weight": weight,
            "by": by,
            "rows": count,
            "seconds": times[count].wall / repeats / many,
            "bytes": nbytes,
            "limit": moved / times["memory"].wall,
            "operations": 2 * count * out * size,
            "error": error,
        }


def available() -> list[str]:
    """The implementations that this machine has."""
    torch = importlib.util.find_spec("torch") is not None and jax.default_backend() == "cpu"
    return ["auto", "xla", *(["torch"] if torch else [])]


Implementation = Callable[[jax.Array, Weight], tuple[Callable[[], Any], int, Callable[[], np.ndarray]]]
"""From x [n, b, k] and a bank of n matrices to what runs the product, how often it does, and what gives its result."""


def _jax(kernels: str, x: jax.Array, bank: Weight):
    with _environment(kernels):
        expert = jnp.arange(len(x), dtype=jnp.int32)
        program = jax.jit(lambda *operands: dispatch.blocks(*operands)).lower(x, expert, bank).compile()
    repeats = REPEATS[jax.default_backend()]

    def run() -> None:
        jax.block_until_ready([program(x, expert, bank) for _ in range(repeats)])

    return run, repeats, lambda: np.asarray(program(x, expert, bank)[0])


def _torch(x: jax.Array, bank: Any):
    """What PyTorch code without kernels does: look every code up, multiply by the scales, then a matrix product."""
    torch: Any = importlib.import_module("torch")

    codes = torch.from_numpy(np.asarray(bank.codes).astype(np.int64))
    scale = torch.from_numpy(np.asarray(bank.block_scale).astype(np.float32) * np.asarray(bank.tensor_scale))
    lookup = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    rows = torch.from_numpy(np.asarray(x).astype(np.float32))

    def product(i: int) -> Any:
        w = torch.stack([lookup[codes[i] & 15], lookup[codes[i] >> 4]], -1).reshape(*scale[i].shape, -1)
        return torch.nn.functional.linear(rows[i], (w * scale[i][..., None]).reshape(bank.shape[1:]))

    return lambda: [product(i) for i in range(len(rows))], 1, lambda: product(0).numpy()


IMPLEMENTATIONS: dict[str, Implementation] = {
    "auto": partial(_jax, "auto"),
    "xla": partial(_jax, "xla"),
    "torch": _torch,
}


@contextmanager
def _environment(kernels: str) -> Iterator[None]:
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = kernels
    try:
        yield
    finally:
        os.environ.pop(VARIABLE) if before is None else os.environ.update({VARIABLE: before})


def _error(result: Callable[[], np.ndarray], x: jax.Array, bank: Weight) -> float:
    """Of the first matrix, against float64."""
    first = jax.tree.map(lambda part: part[0], bank)
    want = np.asarray(x[0], np.float64) @ np.asarray(dequantize(first, jnp.float32), np.float64).T
    return float(np.linalg.norm(result() - want) / np.linalg.norm(want))
