"""What the machine around JAX has: free memory, instructions."""

import functools
import os
import re
from pathlib import Path

CGROUP = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


def available(root: Path = Path("/sys/fs/cgroup"), meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that this process can still take: what the machine has, or what its control group leaves of that."""
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (free,) = re.findall(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    found = int(free) * 1024
    for limit, usage in CGROUP:
        try:
            found = min(found, int((root / limit).read_text()) - int((root / usage).read_text()))
        except (OSError, ValueError):
            continue
    return max(found, 0)


@functools.cache
def multiplies_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor is known to have instructions that multiply bfloat16 and add in float32 (AVX-512 BF16)."""
    return cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()
