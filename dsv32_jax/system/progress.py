"""How far a job is: amounts, rate and times in a line of text."""

import collections
import re
import time
from collections.abc import Callable
from typing import NamedTuple

from ..errors import UsageError

WINDOW = 60.0
"""Seconds whose mean is the rate."""

SMALLEST_BAR = 8
"""Characters below which no bar is drawn."""

_PREFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))


def format_size(count: float) -> str:
    """Return a number of bytes in decimal units: 1.20 GB."""
    unit, size = _find_unit(count)
    return f"{count / size:.{0 if unit == 'B' else 2}f} {unit}"


def _find_unit(count: float) -> tuple[str, float]:
    return next((unit for unit in _UNITS if count >= unit[1]), _UNITS[-1])


def parse_size(value: str | int) -> int:
    """Return the bytes of "8GB" or "500 MiB"; a number without a unit counts bytes. Raises UsageError."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*(?:([kmgt]i?)b?|b)", str(value).strip().lower())
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if match is None:
        unit = " has no unit" if re.fullmatch(r"[0-9.]+", str(value).strip()) else ""
        raise UsageError(f"invalid size {value!r:.200}{unit}; write for example 8GB or 500MB. Nothing was read")
    return int(float(match[1]) * _PREFIXES.get(match[2], 1))


def format_duration(seconds: float) -> str:
    """Return seconds as 0:04, 12:30 or 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def format_count(count: int) -> str:
    """Return a number of parameters: 671.03 B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)


class Progress(NamedTuple):
    """How much of a job is done, in bytes or in another `unit` ("windows"), and the parameter being worked on.

    `saved` is what need not be done again if the job is stopped; None for jobs that begin anew.
    """

    done: int
    total: int
    leaf: str = ""
    saved: int | None = None
    unit: str = "B"

    @property
    def is_complete(self) -> bool:
        """Whether all is done, and saved."""
        return self.done >= self.total and self.saved in (None, self.total)


class ByteMeter:
    """Adds up bytes done and bytes saved, and reports them as progress; `ready` bytes were there before."""

    def __init__(self, report: Callable[[Progress], None], total: int, ready: int):
        self._report, self._total = report, total
        self._done = self._saved = ready
        self._leaf = ""

    def add_done(self, leaf: str, nbytes: int) -> None:
        """Count `nbytes` of `leaf` that are in memory as they will be written."""
        self._leaf = leaf
        self._done = min(self._done + nbytes, self._total)
        self.report()

    def add_saved(self, nbytes: int) -> None:
        """Count `nbytes` that are safely on disk."""
        self._saved += nbytes
        self._done = max(self._done, self._saved)
        self.report()

    def report(self) -> None:
        """Report the current state."""
        self._report(Progress(self._done, self._total, self._leaf, self._saved))


class Meter:
    """Measures the rate of a job, and describes where it is. `progress` is the latest one; `stage`: words before it."""

    def __init__(self):
        self.progress: Progress | None = None
        self.stage = ""
        self._start = time.monotonic()
        self._samples: collections.deque[tuple[float, int]] = collections.deque()

    def update(self, progress: Progress) -> bool:
        """Take the latest progress; return whether it is the first one of a job."""
        now, before = time.monotonic(), self.progress
        is_first = before is None or before.total != progress.total or progress.done < before.done
        if is_first:
            self._start = now
            self._samples.clear()
        self._samples.append((now, progress.done))
        while len(self._samples) > 2 and self._samples[1][0] < now - WINDOW:
            self._samples.popleft()
        self.progress = progress
        return is_first

    @property
    def rate(self) -> float:
        """The amount done in a second, in the mean of the last minute; 0 at the beginning."""
        if len(self._samples) < 2:
            return 0.0
        (then, before), (now, done) = self._samples[0], self._samples[-1]
        return (done - before) / max(now - then, 1e-3)

    @property
    def seconds_left(self) -> float | None:
        """The time for the rest at this rate; None at the beginning."""
        return (self.progress.total - self.progress.done) / self.rate if self.progress and self.rate > 0 else None

    def describe(self, width: int | None = None) -> str:
        """Return percentage, amounts, rate and times in a line of at most `width` characters: the name gives way
        first, then elapsed time, what is saved, and rate; a bar takes what is left."""
        elapsed = format_duration(time.monotonic() - self._start)
        if self.progress is None:
            return f"{self.stage}  {elapsed}"[:width]
        progress, left = self.progress, self.seconds_left
        unit, size = _find_unit(progress.total) if progress.unit == "B" else (progress.unit, 1)
        saved = "" if progress.saved is None else f"{format_amount(progress.saved / size)} {unit} saved"
        pace_unit, pace = _find_unit(self.rate) if progress.unit == "B" else (progress.unit, 1)
        rate = f"{format_amount(self.rate / pace)} {pace_unit}/s"
        parts = {  # in the order of the line, with the order in which they give way
            f"{100 * progress.done / max(progress.total, 1):3.0f} %": 0,
            f"{format_amount(progress.done / size)}/{format_amount(progress.total / size)} {unit}": 1,
            saved: 4,
            rate if self.rate else "": 3,
            f"{elapsed} elapsed": 5,
            "" if left is None or not left else f"{format_duration(left)} left": 2,
            progress.leaf: 6,
        }
        shown = [part for part in parts if part]
        while width is not None and len(shown) > 1 and len("  ".join(shown)) > width:
            shown.remove(max(shown, key=parts.__getitem__))
        spare = 0 if width is None else width - len("  ".join(shown)) - 2
        if spare >= SMALLEST_BAR:
            filled = spare * min(progress.done, progress.total) // max(progress.total, 1)
            shown.insert(1, "━" * filled + "╌" * (spare - filled))
        return "  ".join(shown)[:width]

    def describe_saved(self) -> str:
        """Return what a stopped job need not do again."""
        saved, total = (self.progress.saved or 0, self.progress.total) if self.progress else (0, 0)
        if not saved:
            return "Nothing is saved yet"
        return f"{format_size(saved)} of {format_size(total)} are saved and will not be done again"


def format_amount(value: float) -> str:
    """Return a number with three digits: 0.12, 3.40, 25.1, 671."""
    return f"{value:.{0 if value >= 100 or value == int(value) else 1 if value >= 10 else 2}f}"
