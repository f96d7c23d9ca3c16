"""`dsv32 fit`: whether a model, its cache and what programs need on their way fit in the memory of each device."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from ..config import Config
from ..errors import CapacityError, UsageError, listing, require_integer
from ..model import cache
from ..parallel import partition
from ..system.compilation import initialize
from ..system.progress import parse_size
from . import activations, inventory, memory
from .activations import Shapes
from .request import MOST_DRAFTS, bucket

COMPUTE = {"bfloat16": "bfloat16", "float32": "float32", "bf16": "bfloat16", "fp32": "float32"}
DTYPES = {**COMPUTE, "fp8": "fp8"}
"""What the dtypes of computing and of caches are called."""

LARGEST_BATCH = 1 << 20
CONTEXT = 4096

NOT_COUNTED = """\
not counted: programs and their constants, what loading holds besides (one leaf, or 64 MiB of small ones), buffers of
communication between devices, gaps between allocations, and what else runs here. Activations are those of this
backend's compiler ({backend}), on a mesh those of a device that computes all of its rows alone: an upper bound. The
largest batch and context take activations to grow evenly; a batch is rounded up to a power of two, and so is a context
unless `capacity` is given."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """Bytes on each device. `stored`: weights in their formats; `dequantized`: those that `load` dequantizes.

    `total` is what must be free: `cache` may take memory.SHARE of what the weights leave, and steps the rest.
    largest_batch, longest_context: the most that fit with everything else as it is, 0 where nothing does.
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
    free: int
    largest_batch: int
    longest_context: int

    @property
    def fits(self) -> bool:
        """Whether `total` is free."""
        return self.total <= self.free


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
) -> Fit:
    """What a converted checkpoint, or a config.json with its matrices in `format`, takes on each device of `mesh`.

    Rows hold `context` tokens, prompts included; by default CONTEXT, or as many as the model's longest context. Nothing
    is loaded. Raises UsageError, ConfigError, CheckpointError, and CapacityError where the mesh does not divide the
    model.
    """
    initialize()
    sizes = partition.optional(mesh)
    compute = _dtype("dtype", dtype, tuple(COMPUTE))
    stored = compute if cache_dtype is None else _dtype("cache dtype", cache_dtype, tuple(DTYPES))
    found = inventory.read(path, format)
    cfg = found.cfg
    longest = cfg.max_position_embeddings
    context = min(CONTEXT, longest) if context is None else require_integer("context", context, 1, longest)
    require_integer("batch", batch, 1, LARGEST_BATCH)
    require_integer("draft", draft, 0, MOST_DRAFTS)
    if draft and not cfg.num_nextn_predict_layers:
        raise UsageError(f"draft={draft} needs the drafting layer (MTP), which this model does not have; use draft=0")
    weights = found.device_bytes(sizes, compute)
    devices = math.prod(sizes.values())
    free = memory.available(devices) if device_memory is None else parse_size(device_memory)

    rows, split = memory.rows_bucket(batch), sizes.get("data", 1)
    here = Shapes(memory.rows_of_a_device(rows, split), bucket(context), stored, draft)
    demand = _measured(found, compute, sum(weights), split, here)
    return Fit(
        found.parameters,
        devices,
        context,
        here.capacity,
        batch,
        stored.name,
        draft,
        *weights,
        demand.row(2) - demand.row(1),
        here.batch * demand.row(here.capacity),
        demand.peak,
        demand(rows, here.capacity),
        free,
        (1 << _largest(lambda power: demand(1 << (power - 1), here.capacity) <= free, 20)) >> 1,
        _largest(lambda slots: demand(rows, slots) <= free, longest),
    )


class _Demand(NamedTuple):
    """Bytes that must be free on a device for a batch and a capacity: `peak` is what programs take on their way at
    `shapes`, `wider` and `longer` are how much more with twice the rows and twice the slots."""

    cfg: Config
    weights: int
    split: int
    shapes: Shapes
    peak: int
    wider: int
    longer: int

    def __call__(self, batch: int, capacity: int) -> int:
        """What `generate` needs: it lets caches take memory.SHARE of what is free."""
        rows = memory.rows_of_a_device(batch, self.split)
        held = rows * self.row(capacity)
        more_rows = self.wider * (rows / self.shapes.batch - 1)
        more_slots = self.longer * (capacity / self.shapes.capacity - 1)
        on_its_way = max(0, math.ceil(self.peak + more_rows + more_slots))
        return self.weights + max(held + on_its_way, math.ceil(held / memory.SHARE))

    def row(self, capacity: int) -> int:
        """Bytes of one row."""
        return memory.row_bytes(self.cfg, capacity, self.shapes.dtype, self.shapes.draft)


def _measured(found: inventory.Inventory, compute: np.dtype, weights: int, split: int, shapes: Shapes) -> _Demand:
    wider, longer = shapes._replace(batch=2 * shapes.batch), shapes._replace(capacity=2 * shapes.capacity)
    reading = activations.reading(found, compute, shapes)
    more = [activations.reading(found, compute, other) - reading for other in (wider, longer)]
    peak = max(reading, activations.decoding(found, compute, shapes))
    return _Demand(found.cfg, weights, split, shapes, peak, *more)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` that fits, 0 where none does; what is smaller than one that fits, fits."""
    least = 0
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least


def _dtype(what: str, name: str, known: tuple[str, ...]) -> np.dtype:
    if name not in known:
        raise UsageError(f"the {what} is one of {listing(known)}, not {name!r}; nothing was read")
    return cache.dtype_of(DTYPES[name], None)


def _amount(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def print_fit(found: Fit, as_json: bool) -> int:
    """The table or one JSON object on stdout. Returns the exit code: CapacityError's where it does not fit."""
    facts = {**dataclasses.asdict(found), "fits": found.fits}
    print(json.dumps(facts) if as_json else text(found))
    return 0 if found.fits else CapacityError.exit_code


def text(found: Fit) -> str:
    """The table, the verdict and what is not counted."""
    spare = found.total - found.stored - found.dequantized - found.cache - found.activations
    kept_free = [("kept free", spare, f"caches take at most {memory.SHARE:.0%} of what weights leave")] if spare else []
    plural, drafting = "s" if found.batch > 1 else "", f", drafting {found.draft}" if found.draft else ""
    rows = [
        ("weights", found.stored, f"{_amount(found.parameters)} parameters, as stored"),
        ("W^UK, W^UV", found.dequantized, "dequantized by load"),
        ("cache", found.cache, f"rows of {found.capacity} tokens, {found.token_bytes} bytes each"),
        ("activations", found.activations, "the most that a program takes on its way"),
        *kept_free,
        ("total", found.total, ""),
        ("free", found.free, ""),
    ]
    verdict = "fits" if found.fits else "does not fit"
    where = f"on each of {found.devices} devices" if found.devices > 1 else "on one device"
    return "\n".join(
        [
            f"{'':14}{'GB':>10}   {where}, cache in {found.cache_dtype}{drafting}",
            *(f"{name:14}{size / 1e9:10.2f}   {why}".rstrip() for name, size, why in rows),
            f"{verdict}: {found.batch} row{plural} of {found.context} tokens",
            f"largest batch at this context: {found.largest_batch or 'none'}",
            f"longest context at this batch: {found.longest_context or 'none'}",
            NOT_COUNTED.format(backend=jax.default_backend()),
        ]
    )
