"""What a conversion will take, told without doing it: the dry run."""

import os
import shutil
from typing import Any

from dsv32_jax.parallel import partition
from dsv32_jax.system.progress import format_size

from .. import report
from . import disk, memory, output
from .plan import PlannedLeaf
from .prepare import Prepared


def expected(prepared: Prepared) -> dict[str, Any]:
    """Bytes, memory, time at the speed of the disks, and every leaf with its format, shapes and pieces of the mesh.

    Measures the disks for about a second; what it writes for that has no name and is gone afterwards.
    """
    planned, budget = prepared.plan, prepared.budget
    tensors = {tensor.name: tensor.nbytes for p in planned.leaves for s in p.sources for tensor in s.tensors}
    folder = disk.existing(prepared.dst)
    reading, writing = disk.read_speed(prepared.source), disk.write_speed(folder)
    to_read = sum(tensors.values())
    return {
        "would_read": to_read,
        "would_write": planned.nbytes,
        "peak_memory": prepared.peak,
        "memory_limit": budget.limit,
        "memory_free": memory.get_free_memory(),
        "largest_leaf": max(leaf.nbytes for leaf in planned.leaves),
        "workers": budget.workers,
        "disk_free": shutil.disk_usage(folder).free,
        "read_speed": round(reading),
        "write_speed": writing and round(writing),
        "disk_seconds": writing and round(to_read / reading + planned.nbytes / writing, 1),
        "mesh": prepared.mesh,
        **report.summarize_model(planned.config, planned.formats, list(planned.notes), planned.ignored),
        "conversions": planned.conversions,
        "leaves": {leaf.leaf.path: _arrays(leaf, prepared.mesh) for leaf in planned.leaves},
    }


def require_room(prepared: Prepared) -> None:
    """Raise CapacityError when there is too little memory, or what is not yet written does not fit on the disk."""
    memory.require_free(prepared.peak)
    there = sum(os.path.getsize(os.path.join(root, name)) for root, _, names in os.walk(prepared.dst) for name in names)
    output.require_space(disk.existing(prepared.dst), max(0, prepared.plan.nbytes - there))


def _arrays(leaf: PlannedLeaf, mesh: dict[str, int]) -> str:
    """Format, bytes, and of each array dtype, shape, and what one device of the mesh holds where that is less."""
    if leaf.same_as is not None:
        return f"= {leaf.same_as}"
    texts = []
    for name, (dtype, shape) in leaf.arrays.items():
        piece = partition.split(mesh, leaf.leaf, shape)
        texts.append(f"{name} {dtype} {list(shape)}" + (f" in pieces of {list(piece)}" if piece != shape else ""))
    return f"{leaf.form.format}, {format_size(leaf.nbytes)}: {', '.join(texts)}"
