"""`dsv32 fit`: whether weights, caches and the temporaries of programs fit in the memory of each device.

Temporaries are those of XLA's memory analysis of the prefill program, compiled for shapes alone. A deep model is not
compiled whole: a dense layer with two MoE layers, and one layer more, are extrapolated to all layers.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import UsageError, listing, require_integer
from ..model import cache
from ..model.model import Model, build
from ..parallel import partition
from ..system.compilation import initialize
from ..system.files import expand_path
from ..system.progress import parse_size
from . import memory
from .options import check_option
from .pages import PAGE
from .prefill_decode import empty_caches, new_state
from .programs import WHOLE
from .request import capacity_for, chunk_size, require_drafts
from .weight_shapes import WeightShapes, read_weight_shapes

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

    @property
    def fits(self) -> bool:
        """Whether what must stay in memory, `total` without `mapped`, is free."""
        return self.total - self.mapped <= self.free


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
    device_memory: str | None = None,
    disk_speed: str | None = None,
) -> Fit:
    """Return what a converted checkpoint, or a config.json with its matrices in `format`, needs on each device.

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
    weights = shapes.device_bytes(sizes, compute)
    devices, data = math.prod(sizes.values()), sizes.get("data", 1)
    speed: float | None = parse_size(disk_speed or 0)
    free = memory.get_free_memory(devices) if device_memory is None else parse_size(device_memory)
    mapped = weights[0] if device_memory is None and jax.default_backend() == "cpu" else 0
    batch_rows, capacity = memory.round_up_rows(batch), max(PAGE, capacity_for(cfg, context))
    rows = memory.count_local_rows(batch_rows, data)
    demand = _measure_demand(Setup(shapes, compute, stored, draft), sum(weights), data, rows, capacity)
    total = demand(batch_rows, capacity)
    paged = min(max(0, total - free), mapped) / max(1, mapped)
    speed = measure_disk_speed(path) if paged and not speed else speed
    return Fit(
        shapes.parameters,
        devices,
        context,
        capacity,
        batch,
        stored.name,
        draft,
        *weights,
        demand.row_bytes(2) - demand.row_bytes(1),
        rows * demand.row_bytes(capacity),
        demand.peak,
        total,
        mapped,
        free,
        (paged * shapes.count_step_bytes(rows) / speed if speed else None) if paged else 0.0,
        (1 << _find_largest(lambda power: demand(1 << (power - 1), capacity) - mapped <= free, 20)) >> 1,
        _find_largest(lambda slots: demand(batch_rows, slots) - mapped <= free, longest),
        data * demand.count_pages(rows, free + mapped),
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


class Setup(NamedTuple):
    """A model of shapes, the compute dtype, the dtype of caches, and tokens drafted a step."""

    shapes: WeightShapes
    compute: np.dtype
    cache_dtype: np.dtype
    draft: int


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


def _measure_demand(setup: Setup, weights: int, data: int, rows: int, capacity: int) -> _Demand:
    prefill = measure_prefill(setup, rows, capacity)
    wider = measure_prefill(setup, 2 * rows, capacity) - prefill
    longer = measure_prefill(setup, rows, 2 * capacity) - prefill
    # Decoding takes less than prefill, but for the logits of drafted tokens.
    peak = prefill + rows * setup.draft * setup.shapes.cfg.vocab_size * memory.VOCABULARY_BYTES
    return _Demand(setup, weights, data, rows, capacity, peak, wider, longer)


def measure_prefill(setup: Setup, rows: int, capacity: int) -> int:
    """Return the bytes that prefilling a chunk of every row takes beside weights and caches."""

    def measure(model: Model) -> int:
        caches = partial(empty_caches, model.cfg, rows, capacity, setup.cache_dtype, setup.draft)
        state = jax.eval_shape(lambda: new_state(model, caches(), setup.draft))
        tokens = jax.ShapeDtypeStruct((rows, min(chunk_size(rows), capacity)), jnp.int32)
        count = jax.ShapeDtypeStruct((rows,), jnp.int32)
        return count_temporary(WHOLE.prefill.lower(model, state, tokens, tokens, count, count))

    shallow, deeper = (build_shallow(setup.shapes, setup.compute, more) for more in (0, 1))
    missing = setup.shapes.cfg.num_hidden_layers - len(shallow.layers)
    if not missing:
        return measure(shallow)
    with ThreadPoolExecutor() as pool:
        one, two = pool.map(measure, (shallow, deeper))
    return one + max(0, two - one) * missing


def build_shallow(shapes: WeightShapes, compute: np.dtype, more: int) -> Model:
    """Return a model of shapes: a dense layer, two MoE layers and `more` others, and MTP."""
    cfg, dense = shapes.cfg, shapes.cfg.first_k_dense_replace
    mlps, moes = range(dense), range(dense, cfg.num_hidden_layers)
    layers = sorted([*mlps[:1], *moes[:2], *[*moes[2:], *mlps[1:]][:more]])
    shallow = dataclasses.replace(
        cfg, num_hidden_layers=len(layers), first_k_dense_replace=sum(i < dense for i in layers)
    )

    def get_weight(path: str) -> Any:
        part, _, rest = path.partition(".")
        i, _, name = rest.partition(".")
        return shapes.get_loaded(f"layers.{layers[int(i)]}.{name}" if part == "layers" else path, compute)

    return build(shallow, compute, get_weight)


def count_temporary(lowered: Any) -> int:
    """Return the bytes of a program's temporaries, and of results that do not reuse the memory of an argument."""
    sizes = lowered.compile().memory_analysis()
    return sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes


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
