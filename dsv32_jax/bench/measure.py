"""What the benches share: times, memory, a plain read to compare with, and a table."""

import collections
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..system.host import count_cores

FEWEST_REPEATS = 3
LARGEST_BUFFER = 256 << 20
PROCESS = Path("/proc/self/status")

Row = dict[str, Any]
Key = TypeVar("Key", bound=Hashable)


class Times(NamedTuple):
    """Seconds by the clock, and seconds of processor time that all threads of the process took."""

    wall: float
    cpu: float


def medians(run: Callable[[], Any], seconds: float) -> Times:
    """The times of `run`, repeated for about `seconds`, but at least three times, after one call to warm up."""
    run()
    return Times(*map(statistics.median, zip(*_repeat(run, seconds), strict=True)))


def in_turn(runs: Mapping[Key, Callable[[], Any]], seconds: float) -> dict[Key, Times]:
    """The fastest times of each of `runs`, in `rounds`: what else a machine does only adds to them, and meets all."""
    return {key: Times(*map(min, zip(*times, strict=True))) for key, times in rounds(runs, seconds).items()}


def rounds(runs: Mapping[Key, Callable[[], Any]], seconds: float) -> dict[Key, list[Times]]:
    """The times of each of `runs`: called once to warm up, then in turn, in rounds, for about `seconds` but at least
    three times, each round in an order of its own: what ran before leaves its traces in the caches."""
    found: dict[Key, list[Times]] = {key: [] for key in runs}
    for run in runs.values():
        run()
    keys, order, end = list(runs), random.Random(0), time.perf_counter() + seconds
    while len(found[keys[0]]) < FEWEST_REPEATS or time.perf_counter() < end:
        order.shuffle(keys)
        for key in keys:
            found[key].append(_timed(runs[key]))
    return found


def reader(nbytes: int) -> Callable[[], Any]:
    """What reads `nbytes` of memory and only adds them up, with a thread for each core: no computation is faster.

    It goes as often as needed over a buffer that no cache holds, and so needs little memory.
    """
    threads = count_cores()
    buffer = np.ones(max(1, min(nbytes, LARGEST_BUFFER) // 8), np.uint64)
    rounds, rest = divmod(nbytes // 8, buffer.size)
    parts = [part for piece in [*[buffer] * rounds, buffer[:rest]] for part in np.array_split(piece, threads)]
    pool = ThreadPoolExecutor(threads)
    return lambda: collections.deque(pool.map(np.add.reduce, parts), maxlen=0)


def _repeat(run: Callable[[], Any], seconds: float) -> list[Times]:
    times: list[Times] = []
    end = time.perf_counter() + seconds
    while len(times) < FEWEST_REPEATS or time.perf_counter() < end:
        times.append(_timed(run))
    return times


def _timed(run: Callable[[], Any]) -> Times:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Times(time.perf_counter() - wall, time.process_time() - cpu)


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
