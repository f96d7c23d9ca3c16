"""What the benches share: times, memory, a plain read to compare with, and a table."""

import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FEWEST_REPEATS = 3
LARGEST_BUFFER = 256 << 20
PROCESS = Path("/proc/self/status")

Row = dict[str, Any]


class Times(NamedTuple):
    """Seconds by the clock, and seconds of processor time that all threads of the process took."""

    wall: float
    cpu: float


def medians(run: Callable[[], Any], seconds: float) -> Times:
    """The times of `run`, repeated for about `seconds`, but at least three times, after one call to warm up."""
    run()
    return Times(*map(statistics.median, zip(*_repeat(run, seconds), strict=True)))


def plain_read(nbytes: int, seconds: float) -> float:
    """Seconds in which the host reads `nbytes` of memory and only adds them up, with a thread for each core.

    A limit, so it is the fastest of about `seconds` of repeats: a machine that is busy reads more slowly, but what it
    could do stays. The reader goes as often as needed over a buffer that no cache holds, and so needs little memory.
    """
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    buffer = np.ones(max(1, min(nbytes, LARGEST_BUFFER) // 8), np.uint64)
    rounds, rest = divmod(nbytes // 8, buffer.size)
    parts = [part for piece in [*[buffer] * rounds, buffer[:rest]] for part in np.array_split(piece, threads)]
    with ThreadPoolExecutor(threads) as pool:

        def read() -> None:
            list(pool.map(np.add.reduce, parts))

        read()
        return min(times.wall for times in _repeat(read, seconds))


def _repeat(run: Callable[[], Any], seconds: float) -> list[Times]:
    times: list[Times] = []
    end = time.perf_counter() + seconds
    while len(times) < FEWEST_REPEATS or time.perf_counter() < end:
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        times.append(Times(time.perf_counter() - wall, time.process_time() - cpu))
    return times


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
