"""`dsv32 bench load`: loading a converted checkpoint, against a plain read of the bytes of its files."""

import argparse
import contextlib
import dataclasses
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from ..checkpoint import random_checkpoint
from ..checkpoint.manifest import Manifest
from ..config import Config
from ..system.files import expand_path
from ..system.host import get_resident_memory
from .measure import Row, format_table, get_peak_memory, measure_median

BUFFER_BYTES = 8 << 20

EXPLANATION = """\
All files are in the page cache, so this is the cost of the software, not of the disk. read: one thread reads the files
into one buffer of 8 MiB. ratio: time / that. over: the most memory held during the first load beyond what the process
held before, in a process of its own. model, leaf: what the loaded model holds, and its largest leaf."""

COLUMNS = (
    ("part", 26, lambda row: row["part"]),
    ("time s", 8, lambda row: f"{row['seconds']:.3f}"),
    ("file MB", 9, lambda row: f"{row['bytes'] / 1e6:.1f}"),
    ("MB/s", 8, lambda row: f"{row['bytes'] / row['seconds'] / 1e6:.0f}"),
    ("ratio", 6, lambda row: f"{row['seconds'] / row['read_seconds']:.2f}"),
    ("over MB", 9, lambda row: _megabytes(row["peak_over_baseline"])),
    ("model MB", 9, lambda row: _megabytes(row["model_bytes"])),
    ("leaf MB", 8, lambda row: _megabytes(row["largest_leaf_bytes"])),
)

SIZES = {
    "vocab_size": 16384,
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 16,
    "q_lora_rank": 768,
    "index_n_heads": 16,
    "n_routed_experts": 64,
}
"""What differs from DeepSeek-V3.2 in the random checkpoint of about 1 GB."""


def run(arguments: argparse.Namespace) -> None:
    """Print the table for a checkpoint."""
    print(EXPLANATION)
    for line in format_table(COLUMNS, load(arguments.checkpoint)):
        print(line, flush=True)


def load(checkpoint: str | Path | None = None, cfg: Config | None = None) -> Iterator[Row]:
    """A row for the plain read and two for loading `checkpoint`, as they are made; times in seconds, sizes in bytes.

    Without a checkpoint, one of the model `cfg` (default: about 1 GB) with random weights is written and converted.
    Raises CheckpointError where the folder holds no converted checkpoint.
    """
    with contextlib.ExitStack() as stack:
        if checkpoint is None:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dsv32-bench-")))
            checkpoint = _random(scratch, cfg or _about_1_gb())
        folder = expand_path(checkpoint).resolve()
        Manifest.read(folder)
        files = [file for file in folder.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        seconds = measure_median(lambda: _read(files), 0).wall
        yield _row("plain read", seconds, size, seconds)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            first, again, memory = fresh.submit(_load_twice, folder).result()
        yield _row("load, first in a process", first, size, seconds, **memory)
        yield _row("load again", again, size, seconds)


def _load_twice(folder: Path) -> tuple[float, float, dict[str, int]]:
    """Seconds of two loads, and the memory of the first. Runs in a process that has done nothing else."""
    import jax
    import jax.numpy as jnp

    from ..checkpoint.load import load

    jnp.zeros(()).block_until_ready()
    before = get_resident_memory()
    first, model = _time_run(lambda: jax.block_until_ready(load(folder, dtype=jnp.bfloat16)))
    whole, largest = _sizes(model)
    memory = {
        "peak_over_baseline": get_peak_memory() - before,
        "model_bytes": whole,
        "largest_leaf_bytes": largest,
    }
    del model
    again, _ = _time_run(lambda: jax.block_until_ready(load(folder, dtype=jnp.bfloat16)))
    return first, again, memory


def _sizes(model: Any) -> tuple[int, int]:
    """Bytes of all leaves, each once, and of the largest, a quantized one with all of its components."""
    import jax

    from ..quantization.formats import NVFP4, Fp8Block

    def is_quantized(node) -> bool:
        return isinstance(node, NVFP4 | Fp8Block)

    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(model, is_leaf=is_quantized)}
    sizes = [sum(array.nbytes for array in jax.tree.leaves(leaf)) for leaf in leaves.values()]
    return sum(sizes), max(sizes)


def _time_run(run) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def _about_1_gb() -> Config:
    from .. import configs

    return dataclasses.replace(Config.from_json(configs.path("deepseek_v32")), **SIZES)


def _random(scratch: Path, cfg: Config) -> Path:
    """A converted checkpoint of `cfg` with random NVFP4 weights."""
    from .. import convert

    print("writing a random checkpoint", file=sys.stderr, flush=True)
    random_checkpoint.write(scratch / "source", cfg)
    print("converting it", file=sys.stderr, flush=True)
    convert.convert(scratch / "source", scratch / "converted")
    return scratch / "converted"


def _read(files: list[Path]) -> None:
    """Read `files` from start to end into the same memory."""
    buffer = bytearray(BUFFER_BYTES)
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def _row(part: str, seconds: float, size: int, read_seconds: float, **memory: int) -> Row:
    columns = ("peak_over_baseline", "model_bytes", "largest_leaf_bytes")
    row = {"part": part, "seconds": seconds, "bytes": size, "read_seconds": read_seconds}
    return row | {column: memory.get(column) for column in columns}


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.1f}"
