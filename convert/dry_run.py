"""The dry run: a conversion without writing. It judges source and output as the run does, and measures how long that
would take on a sample of the actual tensors."""

import dataclasses
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dsv32_jax.errors import CheckpointError, DsvError, StorageError
from dsv32_jax.parallel import partition
from dsv32_jax.system.progress import format_size

from . import report
from .conversion import list_missing
from .plan import limits
from .plan.limits import Budget
from .plan.plan import Plan
from .read.provenance import HashingReader
from .read.source import Source
from .transform import cut
from .transform.cut import PlannedLeaf
from .transform.requantize import Requantizer
from .write.journal import Journal
from .write.pipeline import describe

CHUNK_BYTES = 8 << 20
MOST_READ, MOST_WRITTEN = 256 << 20, 1 << 30
SECONDS = 2.0
"""Limits of each measurement of a disk; the first 256 MB are written to the cache of many disks."""

CONVERT_SECONDS, MOST_MATRICES = 0.5, 64
"""Limits of the sample of each kind of matrix."""

SAMPLE_WEIGHTS = 1 << 25
"""Largest matrix of a sample, if there are smaller ones of its kind."""

SHARE = 0.005
"""Kinds with a smaller share of all weights are not measured."""


def estimate(plan: Plan, budget: Budget, dst: Path, journal: Journal | None) -> tuple[dict[str, Any], DsvError | None]:
    """Return bytes, memory, time, and every leaf with its format, shapes and shards on the mesh; with the `journal` of
    an output that can be written, of what is missing there. And the error of a sample that cannot be converted or of a
    disk that cannot be written.

    Takes a few seconds; what it writes to measure the disk has no name and is gone afterwards.
    """
    missing = list(plan.leaves) if journal is None else list_missing(plan, journal)
    to_read = sum({tensor.name: tensor.nbytes for p in missing for s in p.sources for tensor in s.tensors}.values())
    to_write, folder = limits.size_of(missing), limits.find_existing(dst)
    read_speed, problem, write_speed = _measure_read_speed(plan.source), None, None
    try:
        write_speed = _measure_write_speed(folder, to_write)
    except OSError as error:
        problem = StorageError(f"cannot write to {folder}: {error.strerror}. Nothing was written")
    convert_seconds, problems = measure_conversion(plan, budget, missing)
    if problems:
        problem = CheckpointError("; ".join(problems))
    seconds = write_speed and max(convert_seconds, to_read / read_speed) + to_write / write_speed
    facts = {
        "parameters": sum(math.prod(leaf.leaf.shape) for leaf in plan.leaves if leaf.same_as is None),
        **report.summarize_model(plan.config, plan.formats, plan.notes, plan.ignored),
        "conversions": plan.conversions,
        "files": len(plan.source.files),
        "would_read": to_read,
        "would_write": to_write,
        "saved": plan.nbytes - to_write,
        "peak_memory": limits.peak_memory(plan.leaves, budget),
        "memory_limit": budget.limit,
        "memory_free": limits.get_free_memory(),
        "largest_leaf": max(leaf.nbytes for leaf in plan.leaves),
        "workers": budget.workers,
        "disk_needed": to_write + limits.reserve_of(to_write),
        "disk_reserve": limits.reserve_of(to_write),
        "disk_free": shutil.disk_usage(folder).free,
        "read_speed": round(read_speed),
        "write_speed": write_speed and round(write_speed),
        "convert_seconds": round(convert_seconds, 1),
        "seconds": seconds and round(seconds, 1),
        "mesh": plan.mesh,
        "leaves": {leaf.leaf.path: _describe_arrays(leaf, plan.mesh) for leaf in plan.leaves},
    }
    return facts, problem


def measure_conversion(plan: Plan, budget: Budget, leaves: Iterable[PlannedLeaf]) -> tuple[float, list[str]]:
    """Return the seconds that reading, converting and hashing the weights of `leaves` takes with all workers, measured
    on at least one matrix of each kind for each worker; and what is wrong with these matrices."""
    kinds: dict[tuple, list[tuple[int, PlannedLeaf, int]]] = {}
    for leaf in leaves:
        for index, stored in enumerate(leaf.sources):
            kind = (stored.kind, stored.format, stored.wanted, leaf.form.format, leaf.form.dequantized)
            kinds.setdefault(kind, []).append((math.prod(stored.shape), leaf, index))
    totals = {kind: sum(size for size, _, _ in weights) for kind, weights in kinds.items()}
    seconds, problems = 0.0, []
    for kind, weights in kinds.items():
        if totals[kind] < SHARE * sum(totals.values()):
            continue
        sizes = {size for size, _, _ in weights}
        size = max((size for size in sizes if size <= SAMPLE_WEIGHTS), default=min(sizes))
        alike = [(leaf, index) for other, leaf, index in weights if other == size]
        workers = min(len(alike), budget.count_workers([alike[0][0]], budget.fixed))
        spent, problem = _convert(plan, alike[:: -(-len(alike) // MOST_MATRICES)], workers)
        seconds += spent * totals[kind] / size
        problems += [problem] if problem else []
    return seconds, problems


def _convert(plan: Plan, sample: list[tuple[PlannedLeaf, int]], workers: int) -> tuple[float, str]:
    """Return the seconds that one matrix takes where so many workers convert a sample for CONVERT_SECONDS, each at
    least one; and what was wrong."""
    read, requantizer, waiting = HashingReader(plan.source.read), Requantizer(*plan.scaling), iter(sample)

    def convert_some(_: int) -> int:
        count = 0
        for planned, index in waiting:
            shape = (1, *planned.leaf.shape[1:]) if planned.leaf.stacked else planned.leaf.shape
            leaf = planned.leaf._replace(shape=shape, sources=(planned.leaf.sources[index],))
            one = dataclasses.replace(planned, leaf=leaf, sources=(planned.sources[index],))
            describe(one, cut.build(leaf, one.sources, one.form, read, requantizer), None, read)
            count += 1
            if time.monotonic() - start > CONVERT_SECONDS:
                break
        return count

    start, count, problem = time.monotonic(), workers, ""
    with ThreadPoolExecutor(workers) as pool:
        try:
            count = sum(pool.map(convert_some, range(workers)))
        except CheckpointError as error:
            problem = str(error)
    return (time.monotonic() - start) / count, problem


def _describe_arrays(leaf: PlannedLeaf, mesh: dict[str, int]) -> str:
    """Return format, bytes, and of each array the dtype, the shape, and the shape of a device's shard if smaller."""
    if leaf.same_as is not None:
        return f"= {leaf.same_as}"
    texts = []
    for name, (dtype, shape) in leaf.arrays.items():
        shard = partition.shard_shape(mesh, leaf.leaf, shape)
        texts.append(f"{name} {dtype} {list(shape)}" + (f" in shards of {list(shard)}" if shard != shape else ""))
    return f"{leaf.form.name}, {format_size(leaf.nbytes)}: {', '.join(texts)}"


def _measure_write_speed(folder: Path, nbytes: int) -> float:
    """Return the bytes a second at which `nbytes` are written to the disk of `folder`, synced, and read back as a
    conversion does. Raises OSError if it cannot be written to."""
    chunk = os.urandom(CHUNK_BYTES)

    def compare() -> None:
        os.fsync(file.fileno())
        file.seek(0)
        while chunk.startswith(piece := file.read(CHUNK_BYTES)) and piece:
            pass

    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        return _measure_speed(min(nbytes, MOST_WRITTEN), lambda _: file.write(chunk), compare)


def _measure_read_speed(source: Source) -> float:
    """Return the bytes a second read from the largest shard, past the page cache if the kernel allows it."""
    with open(max(source.files, key=lambda file: source.files[file].size), "rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, MOST_READ, os.POSIX_FADV_DONTNEED)
        return _measure_speed(MOST_READ, lambda at: len(os.pread(file.fileno(), CHUNK_BYTES, at)))


def _measure_speed(most: int, move: Callable[[int], int], finish: Callable[[], None] = lambda: None) -> float:
    """Return the bytes a second of `move`, which takes a position and returns how many bytes it moved there."""
    start, moved = time.monotonic(), 0
    while moved < most and time.monotonic() - start < SECONDS and (count := move(moved)):
        moved += count
    finish()
    return max(moved, 1) / max(time.monotonic() - start, 1e-6)
