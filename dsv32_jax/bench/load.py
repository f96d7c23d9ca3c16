"""`dsv32 bench load`: loading a converted checkpoint, copied and mapped, beside a plain read of its bytes."""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint import random_checkpoint
from ..checkpoint.manifest import Manifest
from ..checkpoint.reader import Reader, allocate, list_slabs
from ..config import Config
from ..system.files import expand_path
from ..system.host import count_cores, get_peak_memory, get_resident_memory
from .measure import Row, print_rows

ROUNDS = 5

EXPLANATION = """\
The files are in the page cache, so these are the costs of software, not of a disk. plain read: as many threads as cores
read the files into fresh memory. copied: onto the device. mapped: on a CPU, used where they are; elsewhere the same as
copied. checked: the same after every array was compared with its SHA-256 (verify="full"). first token: of a prompt of 8
tokens after a mapped load, with compiled programs. ratio: GB/s beside the plain read. The best of five rounds,
in a process of its own; its memory is that of the first copied load."""

COLUMNS = (
    ("part", 14, lambda row: row["part"]),
    ("time s", 9, lambda row: f"{row['seconds']:.3f}"),
    ("GB", 8, lambda row: f"{row['bytes'] / 1e9:.3f}"),
    ("GB/s", 8, lambda row: f"{row['bytes'] / row['seconds'] / 1e9:.2f}"),
    ("ratio", 8, lambda row: f"{row['read_seconds'] / row['seconds']:.2f}"),
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
"""The sizes that differ from DeepSeek-V3.2 in the random checkpoint of about 1 GB."""


def run(arguments: argparse.Namespace) -> None:
    """Print a table, or one JSON object, for a checkpoint."""
    found = measure_load(arguments.checkpoint)
    if arguments.json:
        print(json.dumps(found))
        return
    print_rows(EXPLANATION, COLUMNS, list_rows(found), False)
    print(f"host memory beyond the model: {found['peak_over_model_bytes'] / 1e9:.3f} GB at most")


def measure_load(checkpoint: str | Path | None = None, cfg: Config | None = None) -> dict[str, Any]:
    """Measure loading `checkpoint`, or one with random weights of the model `cfg` (default: about 1 GB).

    Raises CheckpointError where the folder holds no converted checkpoint.
    """
    with contextlib.ExitStack() as stack:
        if checkpoint is None:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dsv32-bench-")))
            checkpoint = _write_random(scratch, cfg)
        folder = expand_path(checkpoint).resolve()
        Manifest.read(folder)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            return fresh.submit(_measure, folder).result()


def list_rows(found: dict[str, Any]) -> list[Row]:
    """Return the measured parts as rows of a table."""
    nbytes = found["bytes"]
    read = nbytes / found["plain_read_gbps"] / 1e9
    seconds = {
        "plain read": read,
        "copied": nbytes / found["copied_gbps"] / 1e9,
        "mapped": found["mapped_seconds"],
        "checked": nbytes / found["checked_gbps"] / 1e9,
        "first token": found["first_token_seconds"],
    }
    return [{"part": part, "seconds": time, "bytes": nbytes, "read_seconds": read} for part, time in seconds.items()]


def _measure(folder: Path) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from ..checkpoint.load import load
    from ..generation.generate import generate

    manifest, device = Manifest.read(folder), jax.devices()[0]
    reader, prompt = Reader(folder, manifest.leaves), [list(range(8))]
    nbytes = sum(entry.nbytes for entry in reader.entries.values())
    jnp.zeros(()).block_until_ready()
    before = get_resident_memory()
    _, model = _time(lambda: jax.block_until_ready(load(folder, mapped=False)))
    arrays = {id(array): array for array in jax.tree.leaves(model)}.values()
    on_host = sum(array.nbytes for array in arrays) if device.platform == "cpu" else 0
    peak = get_peak_memory() - before - on_host
    generate(model, prompt, max_new_tokens=1)
    del model, arrays
    times: dict[str, list[float]] = {"read": [], "copied": [], "mapped": [], "checked": [], "token": []}
    for _ in range(ROUNDS):
        times["read"].append(_time(lambda: _read(reader))[0])
        times["copied"].append(_time(lambda: jax.block_until_ready(load(folder, mapped=False)))[0])
        seconds, model = _time(lambda: jax.block_until_ready(load(folder)))
        times["mapped"].append(seconds)
        times["token"].append(_time(partial(generate, model, prompt, max_new_tokens=1))[0])
        del model
        times["checked"].append(_time(lambda: jax.block_until_ready(load(folder, verify="full")))[0])
    best = {part: min(seconds) for part, seconds in times.items()}
    return {
        "device": device.device_kind,
        "bytes": nbytes,
        "plain_read_gbps": nbytes / best["read"] / 1e9,
        "copied_gbps": nbytes / best["copied"] / 1e9,
        "mapped_seconds": best["mapped"],
        "checked_gbps": nbytes / best["checked"] / 1e9,
        "first_token_seconds": best["token"],
        "peak_over_model_bytes": max(0, peak),
    }


def _time(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def _read(reader: Reader) -> None:
    """Read all arrays into memory of their own, in slabs, by a thread per core."""
    with ThreadPoolExecutor(count_cores()) as pool:
        for key, entry in reader.entries.items():
            memory = allocate(entry.shape, entry.dtype)
            for rows in list_slabs(len(memory), memory.nbytes):
                pool.submit(reader.copy, key, memory[rows], (rows,))


def _write_random(scratch: Path, cfg: Config | None) -> Path:
    """Write and convert a checkpoint of `cfg` with random NVFP4 weights."""
    from .. import configs, convert

    cfg = cfg or dataclasses.replace(Config.from_json(configs.path("deepseek_v32")), **SIZES)
    print("writing a random checkpoint", file=sys.stderr, flush=True)
    random_checkpoint.write(scratch / "source", cfg)
    print("converting it", file=sys.stderr, flush=True)
    convert.convert(scratch / "source", scratch / "converted")
    return scratch / "converted"
