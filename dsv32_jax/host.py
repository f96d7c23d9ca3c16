"""What the machine around JAX says: free memory, and Ctrl-C."""

import contextlib
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
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


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Inside the `with`, the first Ctrl-C only makes the given function true; a second one raises KeyboardInterrupt.

    Python delivers signals to its main thread, so elsewhere nothing changes; nor where SIGINT has a handler already.
    """
    asked = False

    def on_signal(*_) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
