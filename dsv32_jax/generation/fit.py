"""`dsv32 fit`: whether weights, caches and the temporaries of programs fit in the memory of devices and host."""

import dataclasses
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from ..checkpoint.weight_shapes import read_weight_shapes
from ..errors import UsageError, listing, require_integer
from ..model import cache
from ..parallel import partition
from ..system import host
from ..system.compilation import initialize
from ..system.files import expand_path
from ..system.progress import parse_size
from . import memory
from .options import check_option
from .pages import PAGE
from .placement import Placement, place
from .programs import capacity_for
from .request import require_drafts
from .temporaries import Setup, measure_prefill

COMPUTE_DTYPES = {"bfloat16": "bfloat16", "float32": "float32", "bf16": "bfloat16", "fp32": "float32"}
CACHE_DTYPES = {**COMPUTE_DTYPES, "fp8": "fp8"}

MAX_BATCH = 1 << 20
DEFAULT_CONTEXT = 4096

DISK_SAMPLE = 256 << 20
"""Bytes that are read to measure the speed of a disk."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """Bytes on each device. `stored`: weights in their formats; `dequantized`: those that `load` dequantizes.

    `total` is what takes memory: `cache` may take memory.CACHE_SHARE of what the weights leave, and steps the rest.
    `mapped` of it are weights that a CPU uses in their files: what memory does not hold is read from disk at each step.
    That takes `page_seconds`, an estimate, 0 if all is in memory and None if the speed of the disk is not known.
    largest_batch, longest_context: the most that fit with everything else unchanged, 0 if nothing does.
    pages: the most pages of PAGE tokens that an engine of `batch` rows has room for, on all devices together.
    hosted: the bytes of the experts of `host_layers` MoE layers in host memory, of which `host_free` bytes are free
    split: the fewest layers in host memory with which all fits; None if none do, and on CPUs
    device_read, host_read: the bytes of weights that a step of one row reads on each device and of host memory
    """

    parameters: int
    devices: int
    context: int
    capacity: int
    batch: int
    cache_dtype: str
    draft: int
    stored: int
    dequantized: int
    token_bytes: int
    cache: int
    activations: int
    total: int
    mapped: int
    free: int
    page_seconds: float | None
    largest_batch: int
    longest_context: int
    pages: int
    host_layers: int
    hosted: int
    host_free: int
    split: int | None
    device_read: float
    host_read: float

    @property
    def fits(self) -> bool:
        """Whether what must stay in memory, `total` without `mapped` and the experts on the host, is free."""
        return self.total - self.mapped <= self.free and self.hosted <= self.host_free

    def estimate_rate(self, device_speed: float, host_speed: float) -> float:
        """Return the tokens a second of one row, if device and host read so many bytes a second, one after the other,
        and nothing else took time."""
        return 1 / (self.device_read / device_speed + (self.host_read / host_speed if self.host_read else 0))


def fit(
    path: str | Path,
    *,
    context: int | None = None,
    batch: int = 1,
    mesh: str | None = None,
    cache_dtype: str | None = None,
    dtype: str = "bf16",
    draft: int = 0,
    format: str | None = None,
    experts: str = "device",
    device_memory: str | None = None,
    host_memory: str | None = None,
    disk_speed: str | None = None,
) -> Fit:
    """Return what a converted checkpoint, or a config.json with its matrices in `format`, needs on each device, and on
    the host with `experts` as in `load`.

    Rows hold `context` tokens, prompts included; by default DEFAULT_CONTEXT or the model's longest context. Without
    `device_memory` the devices are those here; CPUs map the weights, from a disk that reads `disk_speed` bytes a second
    (default: measured on the checkpoint). Nothing is loaded. Raises UsageError, ConfigError, CheckpointError, and
    CapacityError if the mesh does not divide the model.
    """
    initialize()
    sizes = partition.parse_optional_mesh(mesh)
    compute = _parse_dtype("dtype", dtype, COMPUTE_DTYPES)
    stored = compute if cache_dtype is None else _parse_dtype("cache dtype", cache_dtype, CACHE_DTYPES)
    shapes = read_weight_shapes(path, format)
    cfg, longest = shapes.cfg, shapes.cfg.max_position_embeddings
    context = min(DEFAULT_CONTEXT, longest) if context is None else require_integer("context", context, 1, longest)
    require_integer("batch", batch, 1, MAX_BATCH)
    require_drafts(cfg, check_option("draft", draft))
    speed = parse_size(disk_speed or 0)
    room = _find_room(device_memory, host_memory, math.prod(sizes.values()))
    placement = place(shapes, sizes, compute, experts, room.free, room.is_one)
    setup = Setup(shapes, compute, stored, draft)
    return _predict(setup, placement, sizes, room, batch, context, lambda: speed or measure_disk_speed(path))


class _Room(NamedTuple):
    """Bytes that are free on each device and on the host; whether it is the same memory, as on a CPU."""

    free: int
    host_free: int
    is_one: bool


def _find_room(device_memory: str | None, host_memory: str | None, devices: int) -> _Room:
    free = memory.get_free_memory(devices) if device_memory is None else parse_size(device_memory)
    host_free = host.get_free_memory() if host_memory is None else parse_size(host_memory)
    return _Room(free, host_free, device_memory is None and jax.default_backend() == "cpu")


def _predict(
    setup: Setup,
    placement: Placement,
    mesh: partition.MeshShape,
    room: _Room,
    batch: int,
    context: int,
    measure_speed: Callable[[], float | None],
) -> Fit:
    """Return what `fit` does of a model whose weights have been placed."""
    cfg, free, data = setup.shapes.cfg, room.free, mesh.get("data", 1)
    batch_rows, capacity = memory.round_up_rows(batch), max(PAGE, capacity_for(cfg, context))
    rows = memory.count_local_rows(batch_rows, data)
    demand = _measure_demand(setup, placement, data, rows, capacity)
    total, mapped = demand(batch_rows, capacity), placement.weights[0] if room.is_one else 0
    paged = min(max(0, total - free), mapped) / max(1, mapped)
    speed = measure_speed() if paged else None
    return Fit(
        setup.shapes.parameters,
        math.prod(mesh.values()),
        context,
        capacity,
        batch,
        setup.cache_dtype.name,
        setup.draft,
        *placement.weights,
        demand.row_bytes(2) - demand.row_bytes(1),
        rows * demand.row_bytes(capacity),
        demand.peak,
        total,
        mapped,
        free,
        (paged * setup.shapes.count_step_bytes(rows) / speed if speed else None) if paged else 0.0,
        (1 << _find_largest(lambda power: demand(1 << (power - 1), capacity) - mapped <= free, 20)) >> 1,
        _find_largest(lambda slots: demand(batch_rows, slots) - mapped <= free, cfg.max_position_embeddings),
        data * demand.count_pages(rows, free + mapped),
        placement.host_layers,
        placement.hosted,
        room.host_free,
        None if room.is_one else placement.find_split(total, free, room.host_free),
        placement.device_read,
        placement.host_read,
    )


def measure_disk_speed(path: str | Path) -> float | None:
    """Return the bytes a second read from the largest file of a checkpoint, past the page cache if the system allows
    it; None for a config.json."""
    files = [file for file in expand_path(path).rglob("*") if file.is_file()]
    if not files:
        return None
    with open(max(files, key=lambda file: file.stat().st_size), "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start, count = time.perf_counter(), 0
        while count < DISK_SAMPLE and (chunk := file.read(8 << 20)):
            count += len(chunk)
        return max(count, 1) / max(time.perf_counter() - start, 1e-6)


class _Demand(NamedTuple):
    """The memory a device needs, as a function of batch and capacity.

    `peak` is what programs take for `rows` and `capacity`; `wider` and `longer` are how much more with twice of them.
    """

    setup: Setup
    weights: int
    data: int
    rows: int
    capacity: int
    peak: int
    wider: int
    longer: int

    def __call__(self, batch: int, capacity: int) -> int:
        """Return the bytes that must be free, of which caches may take memory.CACHE_SHARE after the weights."""
        rows = memory.count_local_rows(batch, self.data)
        caches = rows * self.row_bytes(capacity)
        more_rows = self.wider * (rows / self.rows - 1)
        more_slots = self.longer * (capacity / self.capacity - 1)
        temporary = max(0, math.ceil(self.peak + more_rows + more_slots))
        return self.weights + max(caches + temporary, math.ceil(caches / memory.CACHE_SHARE))

    def count_pages(self, rows: int, memory_bytes: int) -> int:
        """Return the pages for which a device has room beside weights, temporaries and `rows` rows of few tokens."""
        left = memory_bytes - self.weights
        room = min(left - self.peak, int(left * memory.CACHE_SHARE)) - rows * self.row_bytes(0)
        page = memory.compute_page_bytes(self.setup.shapes.cfg, self.setup.cache_dtype, self.setup.draft)
        return max(0, room) // page

    def row_bytes(self, capacity: int) -> int:
        """Return the bytes of one row."""
        return memory.compute_row_bytes(self.setup.shapes.cfg, capacity, self.setup.cache_dtype, self.setup.draft)


def _measure_demand(setup: Setup, placement: Placement, data: int, rows: int, capacity: int) -> _Demand:
    prefill = measure_prefill(setup, rows, capacity)
    wider = measure_prefill(setup, 2 * rows, capacity) - prefill
    longer = measure_prefill(setup, rows, 2 * capacity) - prefill
    # Decoding takes less than prefill, but for the logits of drafted tokens.
    peak = prefill + rows * setup.draft * setup.shapes.cfg.vocab_size * memory.VOCABULARY_BYTES + placement.sent
    return _Demand(setup, sum(placement.weights), data, rows, capacity, peak, wider, longer)


def _find_largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number from 1 to `most` that fits, 0 if none does, by bisection."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _parse_dtype(label: str, name: str, known: dict[str, str]) -> np.dtype:
    if name not in known:
        raise UsageError(f"the {label} is one of {listing(known)}, not {name!r}; nothing was read")
    return cache.dtype_of(known[name], None)
