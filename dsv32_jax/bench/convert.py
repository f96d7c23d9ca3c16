"""`dsv32 bench convert`: a conversion at the true dimensions, against `cp` of the same bytes in the same run."""

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
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import UsageError
from ..system.progress import parse_size
from . import wide_source
from .measure import Row, peak_bytes, table

VOCABULARY = 2048
"""Tokens: the embedding and the head say nothing about a conversion that the experts do not."""

EXPLANATION = """\
cp: every shard copied and flushed to the disk. convert: the whole job, from the start of its process to the manifest on
the disk, SHA-256 of every tensor read and every array written. verify: every array read back, its SHA-256, and where
formats were kept the source's tensors computed from it. Each begins with nothing of its input in the page cache. MB/s:
of the input. of cp: that against cp. cpu: processor time, all cores together. peak: memory of the process, at most
limit."""

COLUMNS = (
    ("part", 30, lambda row: row["part"]),
    ("in GB", 7, lambda row: f"{row['bytes'] / 1e9:.2f}"),
    ("out GB", 7, lambda row: f"{row['written'] / 1e9:.2f}"),
    ("time s", 7, lambda row: f"{row['seconds']:.1f}"),
    ("MB/s", 6, lambda row: f"{row['bytes'] / row['seconds'] / 1e6:.0f}"),
    ("of cp", 6, lambda row: f"{row['cp_seconds'] / row['seconds'] * row['bytes'] / row['cp_bytes']:.2f}"),
    ("cpu s", 7, lambda row: "-" if row["cpu_seconds"] is None else f"{row['cpu_seconds']:.1f}"),
    ("peak GB", 7, lambda row: "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}"),
    ("limit GB", 8, lambda row: "-" if row["limit_bytes"] is None else f"{row['limit_bytes'] / 1e9:.2f}"),
)


def print_convert(layers: str, storages: list[str], max_memory: str, folder: str | None) -> None:
    """`dsv32 bench convert`."""
    cfg = config(layers)
    print(EXPLANATION)
    rows = (row for storage in storages for row in convert(cfg, storage, max_memory, folder))
    for line in table(COLUMNS, rows):
        print(line, flush=True)


def config(layers: str) -> Config:
    """DeepSeek-V3.2 with the `layers` "1+1", dense and MoE, and a small vocabulary. Raises UsageError."""
    from .. import configs

    match = re.fullmatch(r"(\d{1,2})\+(\d{1,2})", layers)
    if match is None or not 0 < int(match[1]) + int(match[2]) <= 61:
        raise UsageError(f"--layers {layers!r} is not understood: write dense and MoE layers, for example 1+1")
    dense, moe = int(match[1]), int(match[2])
    return dataclasses.replace(
        Config.from_json(configs.path("deepseek_v32")),
        num_hidden_layers=dense + moe,
        first_k_dense_replace=dense,
        num_nextn_predict_layers=0,
        vocab_size=VOCABULARY,
    )


def convert(cfg: Config, storage: str, max_memory: str, folder: str | None = None) -> Iterator[Row]:
    """A row for `cp`, the conversion to NVFP4 and its verification, as each is done; times in seconds, sizes in bytes.

    The source, of the model `cfg` in `storage`, and what becomes of it lie in a folder of their own in `folder`
    (default: where temporary files are), which is removed at the end.
    """
    limit = parse_size(max_memory)
    with tempfile.TemporaryDirectory(prefix="dsv32-bench-", dir=folder) as scratch:
        source, out = Path(scratch, "source"), Path(scratch, "converted")
        print(f"writing a checkpoint in {storage}", file=sys.stderr, flush=True)
        wide_source.write(source, cfg, storage)
        size = _size(source)
        seconds = _cp(source, Path(scratch, "copy"))
        cp = {"cp_seconds": seconds, "cp_bytes": size}
        yield _row(f"cp of {storage}", size, seconds, size, **cp)
        took = _in_a_process(_convert, source, out, max_memory, storage)
        yield _row(f"convert, {storage} -> nvfp4", size, written=_size(out), limit_bytes=limit, **took, **cp)
        shutil.rmtree(source)
        yield _row("verify --level full", _size(out), **_in_a_process(_verify, out), **cp)


def _row(part: str, size: int, seconds: float, written: int = 0, **columns) -> Row:
    optional = {name: columns.pop(name, None) for name in ("cpu_seconds", "peak_bytes", "limit_bytes")}
    return {"part": part, "bytes": size, "seconds": seconds, "written": written, **optional, **columns}


def _cp(source: Path, copy: Path) -> float:
    """Seconds of `cp`, file by file: each copy is removed once it is on the disk, for that may not hold two sources."""
    _forget(source)
    seconds = 0.0
    for file in sorted(source.iterdir()):
        start = time.perf_counter()
        subprocess.run(["cp", str(file), str(copy)], check=True)
        subprocess.run(["sync", str(copy)], check=True)
        seconds += time.perf_counter() - start
        copy.unlink()
    return seconds


def _in_a_process(work, folder: Path, *arguments) -> dict[str, Any]:
    """What `work` on `folder` took, in a process that does nothing else."""
    print(work.__name__.removeprefix("_"), file=sys.stderr, flush=True)
    _forget(folder)
    start = time.perf_counter()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        took = fresh.submit(work, folder, *arguments).result()
        return {"seconds": time.perf_counter() - start, **took}


def _convert(source: Path, out: Path, max_memory: str, storage: str) -> dict[str, Any]:
    os.environ["JAX_PLATFORMS"] = "cpu"
    to = None if storage == "nvfp4" else "nvfp4"
    _converter("write.job").convert(source, out, max_memory=max_memory, to=to)
    return {"cpu_seconds": time.process_time(), "peak_bytes": peak_bytes()}


def _verify(folder: Path) -> dict[str, Any]:
    _converter("verify.verify").verify(folder)
    return {"cpu_seconds": time.process_time(), "peak_bytes": peak_bytes()}


def _converter(module: str) -> Any:
    """A module of the converter, which lies elsewhere in a checkout."""
    return importlib.import_module(f"..convert.{module}", __package__)


def _forget(folder: Path) -> None:
    """Take the files below `folder` out of the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
