"""How much memory a conversion may take, and what it will take: predicted from the plan alone.

In memory are, beside the program: the group of leaves that is being built, what the workers have in hand, the group
before, which is still being written, and the band of it that is on its way to the disk.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from dsv32_jax.checkpoint.chunks import LARGEST as BAND_BYTES
from dsv32_jax.errors import CapacityError, UsageError
from dsv32_jax.system.host import count_cores, get_free_memory
from dsv32_jax.system.progress import format_size, parse_size

from ..read.stored import Stored
from .plan import PlannedLeaf

PROGRAM = 448 << 20
"""Bytes of Python, NumPy, JAX, Orbax, and what malloc keeps (measured: 0.35 to 0.42 GB)."""

GROUP_BYTES = 256 << 20
"""Small leaves are saved together: a save costs 0.1 s whatever its size."""

SHARE = 0.8
"""Of the memory that is available, the share that a conversion takes when it is not told."""

Group = tuple[PlannedLeaf, ...]


class Budget(NamedTuple):
    """At most `limit` bytes of memory, and as many workers as fit into it up to `workers`."""

    limit: int
    workers: int

    def workers_for(self, leaves: Iterable[PlannedLeaf], resident: int) -> int:
        """How many workers can be at work on `leaves` while `resident` bytes are taken."""
        working = max((working_bytes(leaf) for leaf in leaves), default=0)
        return max(1, min(self.workers, (self.limit - resident) // max(1, working)))


def budget(max_memory: str | int | None, workers: int | None) -> Budget:
    """What the user allows; by default most of the memory that is free here, and a worker for each core.

    Raises UsageError.
    """
    if workers is not None and (type(workers) is not int or workers < 1):
        raise UsageError(f"workers must be a whole number, 1 or more, not {workers!r}; nothing was read")
    cores = count_cores()
    return Budget(int(get_free_memory() * SHARE) if max_memory is None else parse_size(max_memory), workers or cores)


@functools.lru_cache(maxsize=4096)
def working_bytes(leaf: PlannedLeaf) -> int:
    """What one worker has in hand beside the leaf itself: one weight as it is read, in between, and as it is stored."""
    sources = leaf.sources
    if leaf.form.dequantized is not None:
        sources = [dataclasses.replace(stored, wanted="bf16") for stored in sources]
    most = max((_reading(stored) + _converting(stored) for stored in sources), default=0)
    whole = not leaf.leaf.stacked and leaf.leaf.cut is None
    return max(0, most - leaf.nbytes) if whole else most


def need(leaf: PlannedLeaf) -> int:
    """The least memory in which `leaf` can be converted: by one worker, with nothing else in memory."""
    return PROGRAM + BAND_BYTES + leaf.nbytes + working_bytes(leaf)


def require(leaves: Iterable[PlannedLeaf], limit: int) -> None:
    """Raise CapacityError when a leaf does not fit into `limit` bytes."""
    largest = max(leaves, key=need)
    if need(largest) > limit:
        too_large = f"{largest.leaf.path} ({format_size(largest.nbytes)}, {largest.form.format})"
        smallest = -(-need(largest) >> 20)
        raise CapacityError(
            f"{format_size(limit)} of memory are too little: converting {too_large} takes "
            f"{format_size(need(largest))}, {format_size(PROGRAM + BAND_BYTES)} of which the program takes with any. "
            f"Nothing was written. The smallest limit that works is --max-memory {smallest}MiB"
        )


def require_free(peak: int) -> None:
    """Raise CapacityError when `peak` bytes are more than this process can take: it would be killed on the way."""
    free = get_free_memory()
    if peak > free:
        raise CapacityError(
            f"the conversion takes up to {format_size(peak)} of memory, and {format_size(free)} are free here. "
            f"Nothing new was written; free some, or give a limit: --max-memory {int(free * SHARE) >> 20}MiB"
        )


def groups(leaves: Sequence[PlannedLeaf], limit: int, most: int = GROUP_BYTES) -> Iterator[Group]:
    """Runs of consecutive leaves of at most `most` bytes (less where `limit` asks for it), or of one larger leaf."""
    spare = limit - max(need(leaf) - leaf.nbytes for leaf in leaves) if leaves else 0
    most = min(most, max(spare, 0))
    group: list[PlannedLeaf] = []
    size = 0
    for leaf in leaves:
        if group and size + leaf.nbytes > most:
            yield tuple(group)
            group, size = [], 0
        group.append(leaf)
        size += leaf.nbytes
    if group:
        yield tuple(group)


def size(group: Iterable[PlannedLeaf]) -> int:
    """Bytes of the arrays of `group`."""
    return sum(leaf.nbytes for leaf in group)


def fits(group: Group, before: int, limit: int) -> bool:
    """Whether `group` can be built while `before` bytes are still being written."""
    return before + _building(group) <= limit


def peak(groups: Iterable[Group], allowed: Budget) -> int:
    """The bytes that a conversion of `groups` will take at most."""
    most = before = 0
    for group in groups:
        resident = before if fits(group, before, allowed.limit) else 0
        taken = PROGRAM + BAND_BYTES + resident + size(group)
        working = max((working_bytes(leaf) for leaf in group), default=0)
        most = max(most, taken + allowed.workers_for(group, taken) * working)
        before = size(group)
    return most


def _building(group: Group) -> int:
    return PROGRAM + BAND_BYTES + size(group) + max((working_bytes(leaf) for leaf in group), default=0)


def _reading(stored: Stored) -> int:
    return sum(tensor.nbytes for tensor in stored.tensors)


def _converting(stored: Stored) -> int:
    """The values in between and the result of one weight that changes its format; nothing of one that keeps it."""
    if stored.wanted is None and stored.format == stored.becomes[0]:
        return _row_scales(stored)
    exact = 4 if stored.format.startswith("nvfp4") or stored.values.dtype == "F32" else 2
    folded = 2 if stored.pre_quant_scale is not None else 1
    return math.prod(stored.shape) * (exact * folded + 2) + _row_scales(stored)


def _row_scales(stored: Stored) -> int:
    """FP8 scales of rows, which the source has for blocks."""
    return math.prod(stored.shape) // 32 if "fp8_block" in (stored.format, stored.becomes[0]) else 0
