"""Times and memory of a function, and tables."""

import json
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

MIN_REPEATS = 3

Row = dict[str, Any]
Key = TypeVar("Key")

Column = tuple[str, int, Callable[[Row], str]]
"""Heading, width, and the text of a row."""


class Times(NamedTuple):
    """Seconds of wall time, and of processor time in all threads of the process."""

    wall: float
    cpu: float


def measure_median(run: Callable[[], Any], seconds: float) -> Times:
    """Return median times of `run`, repeated for about `seconds` after a warm-up."""
    (times,) = _repeat({"": run}, seconds).values()
    return Times(*map(statistics.median, zip(*times, strict=True)))


def measure_fastest(runs: Mapping[Key, Callable[[], Any]], seconds: float) -> dict[Key, Times]:
    """Return the fastest times of each function. They run in turn, so that other load on the machine meets all."""
    return {key: Times(*map(min, zip(*times, strict=True))) for key, times in _repeat(runs, seconds).items()}


def _repeat(runs: Mapping[Key, Callable[[], Any]], seconds: float) -> dict[Key, list[Times]]:
    """Run each function once, then all in rounds of random order, as what ran before leaves traces in the caches."""
    found: dict[Key, list[Times]] = {key: [] for key in runs}
    for run in runs.values():
        run()
    keys, order, end = list(runs), random.Random(0), time.perf_counter() + seconds
    while len(found[keys[0]]) < MIN_REPEATS or time.perf_counter() < end:
        order.shuffle(keys)
        for key in keys:
            wall, cpu = time.perf_counter(), time.process_time()
            runs[key]()
            found[key].append(Times(time.perf_counter() - wall, time.process_time() - cpu))
    return found


def print_rows(explanation: str, columns: Sequence[Column], rows: Iterable[Row], as_json: bool) -> None:
    """Print each row as soon as it is there: as a line of JSON, or as one of a table below its explanation."""
    if not as_json:
        print(explanation)
    for line in map(json.dumps, rows) if as_json else format_table(columns, rows):
        print(line, flush=True)


def format_table(columns: Sequence[Column], rows: Iterable[Row]) -> Iterator[str]:
    """Yield the lines of a table, each as soon as its row is there."""
    yield format_line(columns)
    for row in rows:
        yield format_line(columns, row)


def format_line(columns: Sequence[Column], row: Row | None = None) -> str:
    """Return the line of a row, or of the headings: the first column aligned left, the others right."""
    (first, width), *rest = [(heading if row is None else text(row), width) for heading, width, text in columns]
    return "  ".join([first.ljust(width), *(text.rjust(width) for text, width in rest)]).rstrip()
