"""Resources of the machine: free memory, cores, instructions."""

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple


class _Version(NamedTuple):
    """A version of Linux's control groups: its mount, the names of its files, what memory.stat calls page cache."""

    mount: str
    limit: str
    usage: str
    reclaimable: tuple[str, ...]


V1 = _Version(
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
V2 = _Version("sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file", "slab_reclaimable"))


def get_free_memory(root: Path = Path("/")) -> int:
    """Return the bytes this process can still allocate: what the machine has, or what its control groups leave of it.

    Page cache counts as free, as in Linux's MemAvailable: the kernel drops it when memory is needed. Where a system
    does not say what is free (macOS), all of its memory.
    """
    try:
        meminfo = (root / "proc/meminfo").read_text()
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (available,) = re.findall(r"^MemAvailable:\s+(\d+) kB$", meminfo, re.MULTILINE)
    return max(0, min([int(available) * 1024, *_read_cgroup_room(root)]))


def _read_cgroup_room(root: Path) -> Iterator[int]:
    """Yield what each control group with a limit leaves: the one of this process, and all that it is nested in."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        groups = ["0::/", "1:memory:/"]
    for group in groups:
        _, controllers, path = group.split(":", 2)
        version = V2 if not controllers else V1 if "memory" in controllers.split(",") else None
        if version is None:
            continue
        # A container may see a path from outside: one with "..", or one that does not exist below its own mount.
        inside = PurePosixPath("" if ".." in path else path.lstrip("/"))
        for level in (inside, *inside.parents):
            room = _read_room(root / version.mount / level, version)
            if room is not None:
                yield room


def _read_room(folder: Path, version: _Version) -> int | None:
    """Return limit - usage + page cache, None for a group without a limit."""
    try:
        limit, usage = (int((folder / name).read_text()) for name in (version.limit, version.usage))
    except (OSError, ValueError):
        return None
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        stat = {}
    return limit - usage + sum(int(stat.get(name, 0)) for name in version.reclaimable)


def get_resident_memory() -> int:
    """Return the bytes of memory this process occupies now; where a system does not say, the most it ever did."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return get_peak_memory()


def get_peak_memory() -> int:
    """Return the most memory this process has held. Unlike VmHWM, ru_maxrss of a child starts at its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        (peak,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
        return 1024 * int(peak)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, which has no /proc


def count_cores() -> int:
    """Return how many cores this process may use, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def has_avx512_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether the processor is known to multiply bfloat16 and add in float32 (AVX-512 BF16)."""
    return cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()
