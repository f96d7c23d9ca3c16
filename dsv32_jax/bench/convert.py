"""`dsv32 bench convert`: a conversion at the true dimensions, beside `cp` of the same bytes in the same run."""

import argparse
import dataclasses
import importlib
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from ..checkpoint import random_checkpoint
from ..config import Config
from ..errors import UsageError
from ..system.progress import parse_size
from .measure import Row, get_peak_memory, print_rows

VOCABULARY = 2048
"""Tokens: the embedding and the head add nothing to what the experts say about a conversion."""

EXPLANATION = """\
cp: every shard copied and flushed to the disk. convert: the whole job, from the start of its process to the manifest on
the disk, SHA-256 of every tensor read and every array written. verify: every array read back, its SHA-256, and where
formats were kept the source's tensors computed from it. Each starts with none of its input in the page cache. MB/s: of
the input. of cp: that relative to cp. cpu: processor time, all cores together. peak: memory of the process, at most
limit."""


def _format_optional(name: str, form: str, scale: float = 1.0) -> Callable[[Row], str]:
    return lambda row: "-" if row[name] is None else format(row[name] / scale, form)


COLUMNS = (
    ("part", 30, lambda row: row["part"]),
    ("in GB", 7, lambda row: f"{row['bytes'] / 1e9:.2f}"),
    ("out GB", 7, lambda row: f"{row['written'] / 1e9:.2f}"),
    ("time s", 7, lambda row: f"{row['seconds']:.1f}"),
    ("MB/s", 6, lambda row: f"{row['bytes'] / row['seconds'] / 1e6:.0f}"),
    ("of cp", 6, lambda row: f"{row['bytes'] / row['seconds'] / row['cp_speed']:.2f}"),
    ("cpu s", 7, _format_optional("cpu_seconds", ".1f")),
    ("peak GB", 7, _format_optional("peak_bytes", ".2f", 1e9)),
    ("limit GB", 8, _format_optional("limit_bytes", ".2f", 1e9)),
)


def run(arguments: argparse.Namespace) -> None:
    """Print the table for a source in each format."""
    cfg, limit = make_config(arguments.layers), arguments.max_memory
    storages = arguments.source or ("fp8", "nvfp4")
    rows = (row for storage in storages for row in measure_convert(cfg, storage, limit, arguments.folder))
    print_rows(EXPLANATION, COLUMNS, rows, arguments.json)


def make_config(layers: str) -> Config:
    """Return DeepSeek-V3.2's config with `layers` "1+1" (dense and MoE) and a small vocabulary. Raises UsageError."""
    from .. import configs

    match = re.fullmatch(r"([0-9]{1,2})\+([0-9]{1,2})", layers)
    if match is None or not 0 < int(match[1]) + int(match[2]) <= 61:
        raise UsageError(f"invalid --layers {layers!r}: write dense and MoE layers, for example 1+1")
    dense, moe = int(match[1]), int(match[2])
    return dataclasses.replace(
        Config.from_json(configs.path("deepseek_v32")),
        num_hidden_layers=dense + moe,
        first_k_dense_replace=dense,
        num_nextn_predict_layers=0,
        vocab_size=VOCABULARY,
    )


def measure_convert(cfg: Config, storage: str, max_memory: str, folder: str | None = None) -> Iterator[Row]:
    """Yield a row each for `cp`, the conversion to NVFP4 and its verification; times in seconds, sizes in bytes.

    The source, in `storage`, and the output lie in a new folder in `folder` (default: the temporary folder), which is
    removed at the end.
    """
    limit = parse_size(max_memory)
    with tempfile.TemporaryDirectory(prefix="dsv32-bench-", dir=folder) as scratch:
        source, out = Path(scratch, "source"), Path(scratch, "converted")
        print(f"writing a checkpoint in {storage}", file=sys.stderr, flush=True)
        random_checkpoint.write_large(source, cfg, storage)
        size = _count_bytes(source)
        seconds = _time_cp(source, Path(scratch, "copy"))
        row = {"cp_speed": size / seconds, "cpu_seconds": None, "peak_bytes": None, "limit_bytes": None}
        yield {**row, "part": f"cp of {storage}", "bytes": size, "written": size, "seconds": seconds}
        converted = _run_alone(_convert, source, out, max_memory, storage)
        part = {"part": f"convert, {storage} -> nvfp4", "bytes": size, "written": _count_bytes(out)}
        yield {**row, **part, "limit_bytes": limit, **converted}
        shutil.rmtree(source)
        part = {"part": "verify --level full", "bytes": _count_bytes(out), "written": 0}
        yield {**row, **part, **_run_alone(_verify, out)}


def _time_cp(source: Path, copy: Path) -> float:
    """Return the seconds of `cp`, file by file; each copy is removed, as the disk may not hold two sources."""
    _drop_from_cache(source)
    seconds = 0.0
    for file in sorted(source.iterdir()):
        start = time.perf_counter()
        subprocess.run(["cp", str(file), str(copy)], check=True)
        subprocess.run(["sync", str(copy)], check=True)
        seconds += time.perf_counter() - start
        copy.unlink()
    return seconds


def _run_alone(job: Callable[..., None], folder: Path, *arguments: Any) -> dict[str, Any]:
    """Return the time and memory of a job on `folder` in a process of its own."""
    print(job.__name__.removeprefix("_"), file=sys.stderr, flush=True)
    _drop_from_cache(folder)
    start = time.perf_counter()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        fresh.submit(job, folder, *arguments).result()
        seconds = time.perf_counter() - start
        cpu, peak = fresh.submit(time.process_time).result(), fresh.submit(get_peak_memory).result()
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak}


def _convert(source: Path, out: Path, max_memory: str, storage: str) -> None:
    from .. import convert

    convert.convert(source, out, max_memory=max_memory, to=None if storage == "nvfp4" else "nvfp4")


def _verify(folder: Path) -> None:
    importlib.import_module("..convert.verify.verify", __package__).verify(folder)


def _drop_from_cache(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _count_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
