"""What the benches share: times, memory, a plain read to compare with, and a table."""

import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

FEWEST_REPEATS = 3
PROCESS = Path("/proc/self/status")

Row = dict[str, Any]


def median_seconds(run: Callable[[], Any], seconds: float) -> float:
    """The median time of `run`, repeated for about `seconds`, but at least three times, after one call to warm up."""
    run()
    times: list[float] = []
    while len(times) < FEWEST_REPEATS or sum(times) < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def plain_read(nbytes: int, seconds: float) -> float:
    """Seconds that the host needs to read `nbytes` of memory and only add them up, with a thread for each core."""
    threads = os.cpu_count() or 1
    parts = np.array_split(np.ones(max(1, nbytes // 8), np.uint64), threads)
    with ThreadPoolExecutor(threads) as pool:
        return median_seconds(lambda: list(pool.map(np.add.reduce, parts)), seconds)


def peak_bytes() -> int:
    """The most memory this process has held so far.

    Linux's own count where there is one: `ru_maxrss` of a child process starts at what its parent holds.
    """
    if PROCESS.exists():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def held_bytes() -> int:
    """The memory this process holds now; where the system does not tell, the most it has held."""
    return _status("VmRSS") if PROCESS.exists() else peak_bytes()


def _status(key: str) -> int:
    line = next(line for line in PROCESS.read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


Column = tuple[str, int, Callable[[Row], str]]
"""Heading, width, and the text of a row."""


def table(columns: Sequence[Column], rows: Iterable[Row]) -> Iterator[str]:
    """The lines of a table, each as soon as its row is there; the first column is aligned to the left."""

    def line(texts: Sequence[str]) -> str:
        widths = [width for _, width, _ in columns]
        first, *rest = zip(texts, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in rest)]).rstrip()

    yield line([heading for heading, _, _ in columns])
    for row in rows:
        yield line([text(row) for _, _, text in columns])
