"""The dry run: what a conversion would read, write and take, without doing it."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv32_jax.parallel import partition
from dsv32_jax.system.progress import format_size

from .. import report
from ..read.source import Source
from ..transform.cut import PlannedLeaf
from . import limits
from .limits import Budget
from .plan import Plan

CHUNK_BYTES = 8 << 20
MOST_BYTES = 256 << 20
SECONDS = 0.5
"""Limits of each measurement of a disk."""


def estimate(plan: Plan, budget: Budget, dst: Path) -> dict[str, Any]:
    """Return bytes, memory, disk time, and every leaf with its format, shapes and shards on the mesh.

    Takes about a second to measure the disks; what it writes for that has no name and is gone afterwards.
    """
    tensors = {tensor.name: tensor.nbytes for p in plan.leaves for s in p.sources for tensor in s.tensors}
    folder = _find_existing(dst)
    read_speed, write_speed = _measure_read_speed(plan.source), _measure_write_speed(folder)
    to_read = sum(tensors.values())
    return {
        "would_read": to_read,
        "would_write": plan.nbytes,
        "peak_memory": limits.peak_memory(plan.leaves, budget),
        "memory_limit": budget.limit,
        "memory_free": limits.get_free_memory(),
        "largest_leaf": max(leaf.nbytes for leaf in plan.leaves),
        "workers": budget.workers,
        "disk_free": shutil.disk_usage(folder).free,
        "read_speed": round(read_speed),
        "write_speed": write_speed and round(write_speed),
        "disk_seconds": write_speed and round(to_read / read_speed + plan.nbytes / write_speed, 1),
        "mesh": plan.mesh,
        **report.summarize_model(plan.config, plan.formats, list(plan.notes), plan.ignored),
        "conversions": plan.conversions,
        "leaves": {leaf.leaf.path: _describe_arrays(leaf, plan.mesh) for leaf in plan.leaves},
    }


def require_room(plan: Plan, budget: Budget, dst: Path) -> None:
    """Raise CapacityError if there is too little memory, or too little disk space for what is not yet written."""
    limits.require_free_memory(limits.peak_memory(plan.leaves, budget))
    files = (os.path.join(root, name) for root, _, names in os.walk(dst) for name in names)
    written = sum(map(os.path.getsize, files))
    limits.require_disk_space(_find_existing(dst), max(0, plan.nbytes - written))


def _describe_arrays(leaf: PlannedLeaf, mesh: dict[str, int]) -> str:
    """Return format, bytes, and of each array the dtype, the shape, and the shape of a device's shard if smaller."""
    if leaf.same_as is not None:
        return f"= {leaf.same_as}"
    texts = []
    for name, (dtype, shape) in leaf.arrays.items():
        shard = partition.shard_shape(mesh, leaf.leaf, shape)
        texts.append(f"{name} {dtype} {list(shape)}" + (f" in shards of {list(shard)}" if shard != shape else ""))
    return f"{leaf.form.format}, {format_size(leaf.nbytes)}: {', '.join(texts)}"


def _find_existing(folder: Path) -> Path:
    """Return `folder`, or the nearest folder above it that exists."""
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())


def _measure_write_speed(folder: Path) -> float | None:
    """Return the bytes a second written and synced to the disk of `folder`; None if it cannot be written to."""
    chunk = os.urandom(CHUNK_BYTES)
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            return _measure_speed(lambda _: file.write(chunk), lambda: os.fsync(file.fileno()))
    except OSError:
        return None


def _measure_read_speed(source: Source) -> float:
    """Return the bytes a second read from the largest shard, past the page cache if the kernel allows it."""
    with open(max(source.files, key=lambda file: source.files[file].size), "rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, MOST_BYTES, os.POSIX_FADV_DONTNEED)
        return _measure_speed(lambda at: len(os.pread(file.fileno(), CHUNK_BYTES, at)))


def _measure_speed(move: Callable[[int], int], finish: Callable[[], None] = lambda: None) -> float:
    """Return the bytes a second of `move`, which takes a position and returns how many bytes it moved there."""
    start, moved = time.monotonic(), 0
    while moved < MOST_BYTES and time.monotonic() - start < SECONDS and (count := move(moved)):
        moved += count
    finish()
    return max(moved, 1) / max(time.monotonic() - start, 1e-6)
