"""Memory and disk of a conversion: what the user allows, what the plan needs, what the machine has.

In memory are, beside the program: the group of leaves being built, the weights that workers have in hand, the previous
group, which is still being written, and the chunk of it on its way to the disk.
"""

import dataclasses
import functools
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dsv32_jax.checkpoint.reader import SLAB_BYTES
from dsv32_jax.errors import CapacityError, argument, require_integer
from dsv32_jax.system.host import count_cores, get_free_memory
from dsv32_jax.system.progress import format_size, parse_size

from ..read.weights import StoredWeight
from ..transform.cut import PlannedLeaf

PROGRAM_BYTES = 128 << 20
"""Python, NumPy, and what malloc keeps (measured: up to 75 MB)."""

TENSOR_BYTES = 2048
"""Memory per source tensor: its header entry, its provenance in the journal and the manifest (measured: 1.7 kB)."""

GROUP_BYTES = 256 << 20
"""Small leaves are saved together: a save costs 0.1 s whatever its size."""

SHARE = 0.8
"""The share of free memory that a conversion takes by default."""

DISK_RESERVE = 64 << 20
"""Bytes of disk that a conversion leaves free, beside 2 % of what it writes."""

Group = tuple[PlannedLeaf, ...]
"""Leaves that are saved together."""


class Budget(NamedTuple):
    """At most `limit` bytes of memory, of which `fixed` are needed throughout; as many workers as fit into it, up to
    `workers`; about `group_bytes` of leaves saved together."""

    limit: int
    workers: int
    group_bytes: int = GROUP_BYTES
    fixed: int = PROGRAM_BYTES + 4 * SLAB_BYTES

    def count_workers(self, leaves: Iterable[PlannedLeaf], resident: int) -> int:
        """Return how many workers can work on `leaves` while `resident` bytes are taken, at least 1."""
        working = max((working_bytes(leaf) for leaf in leaves), default=0)
        return max(1, min(self.workers, (self.limit - resident) // max(1, working)))


def make_budget(max_memory: str | int | None, workers: int | None, group_bytes: int | None = None) -> Budget:
    """Return what the user allows; by default 80 % of free memory and a worker per core. Raises UsageError."""
    limit = int(get_free_memory() * SHARE) if max_memory is None else parse_size(max_memory)
    workers = count_cores() if workers is None else require_integer("workers", workers, 1)
    return Budget(limit, workers, GROUP_BYTES if group_bytes is None else group_bytes)


def fixed_bytes(leaves: Iterable[PlannedLeaf]) -> int:
    """Return the memory that a conversion needs throughout."""
    tensors = {stored.name: len(stored.tensors) for leaf in leaves for stored in leaf.sources}
    return PROGRAM_BYTES + 4 * SLAB_BYTES + TENSOR_BYTES * sum(tensors.values())


@functools.lru_cache(maxsize=4096)
def working_bytes(leaf: PlannedLeaf) -> int:
    """Return what one worker needs beside the leaf itself: one weight as read, in between, and as stored."""
    sources = leaf.sources
    if leaf.form.dequantized is not None:
        sources = [dataclasses.replace(stored, wanted="bf16") for stored in sources]
    most = max((_loading_bytes(stored) for stored in sources), default=0)
    is_whole = not leaf.leaf.stacked and leaf.leaf.cut is None
    return max(0, most - leaf.nbytes) if is_whole else most


def _loading_bytes(stored: StoredWeight) -> int:
    """Return the bytes of one weight as read, plus the values in between and the result if it is converted."""
    elements = math.prod(stored.shape)
    read = sum(tensor.nbytes for tensor in stored.tensors)
    row_scales = elements // 32 if "fp8_block" in (stored.format, stored.becomes[0]) else 0
    if stored.wanted is None and stored.format == stored.becomes[0]:
        return read + row_scales
    exact = 4 if stored.format.startswith("nvfp4") or stored.values.dtype == "F32" else 2
    folded = 2 if stored.pre_quant_scale is not None else 1
    return read + elements * (exact * folded + 2) + row_scales


def require_limit(leaves: Iterable[PlannedLeaf], budget: Budget) -> None:
    """Raise CapacityError if a leaf cannot be converted within the limit, even by one worker and all by itself."""
    largest = max(leaves, key=lambda leaf: leaf.nbytes + working_bytes(leaf))
    if (needed := budget.fixed + largest.nbytes + working_bytes(largest)) > budget.limit:
        raise CapacityError(
            f"a memory limit of {format_size(budget.limit)} is too small: {format_size(needed)} needed "
            f"({format_size(budget.fixed)} fixed) for {largest.leaf.path} ({format_size(largest.nbytes)}, "
            f"{largest.form.format}). Nothing was written; "
            f"the smallest limit that works is {argument('max_memory', f'{-(-needed // 10**6)}MB')}"
        )


def require_free_memory(peak: int) -> None:
    """Raise CapacityError if `peak` bytes are more than this process can still take: it would be killed on the way."""
    free = get_free_memory()
    if peak > free:
        limit = argument("max_memory", f"{int(free * SHARE) // 10**6}MB")
        raise CapacityError(
            f"not enough memory: need up to {format_size(peak)}, {format_size(free)} free. "
            f"Nothing new was written; free some, or set a limit: {limit}"
        )


def group_leaves(leaves: Sequence[PlannedLeaf], budget: Budget) -> Iterator[Group]:
    """Yield runs of consecutive leaves of at most `group_bytes` (fewer if memory requires it), or one larger leaf."""
    spare = budget.limit - budget.fixed - max(map(working_bytes, leaves), default=0)
    most = min(budget.group_bytes, max(spare, 0))
    group: Group = ()
    for leaf in leaves:
        if group and size_of(group) + leaf.nbytes > most:
            yield group
            group = ()
        group += (leaf,)
    if group:
        yield group


def size_of(group: Iterable[PlannedLeaf]) -> int:
    """Return the bytes of the arrays of `group`."""
    return sum(leaf.nbytes for leaf in group)


def fits_beside(group: Group, writing: int, budget: Budget) -> bool:
    """Return whether `group` can be built while `writing` bytes are still being written."""
    return budget.fixed + writing + size_of(group) + max(map(working_bytes, group), default=0) <= budget.limit


def peak_memory(leaves: Sequence[PlannedLeaf], budget: Budget) -> int:
    """Return the most memory that a conversion of `leaves` takes."""
    most = writing = 0
    for group in group_leaves(leaves, budget):
        resident = budget.fixed + size_of(group) + (writing if fits_beside(group, writing, budget) else 0)
        working = max(map(working_bytes, group), default=0)
        most = max(most, resident + budget.count_workers(group, resident) * working)
        writing = size_of(group)
    return most


def find_existing(folder: Path) -> Path:
    """Return `folder`, or the nearest folder above it that exists."""
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())


def reserve_of(needed: int) -> int:
    """Return the bytes of disk that a conversion of `needed` bytes leaves free."""
    return needed // 50 + DISK_RESERVE


def require_disk_space(folder: Path, needed: int) -> None:
    """Raise CapacityError if `needed` bytes do not fit on the disk of `folder`, where it tells its size."""
    (total, _, free), reserve = shutil.disk_usage(folder), reserve_of(needed)
    if total and free < needed + reserve:
        raise CapacityError(
            f"not enough disk space in {folder}: need {format_size(needed + reserve)} "
            f"({format_size(reserve)} reserve), {format_size(free)} free. "
            "Nothing new was written; free some space or use another disk"
        )
