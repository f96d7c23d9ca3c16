"""Progress of a job on stderr, as a bar on a terminal, lines in a log or JSON lines for a program; sizes as text."""

import contextlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ..errors import UsageError, printable
from .host import get_resident_memory

INTERVAL = 10.0
"""Seconds between two lines of a log."""

_PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def format_size(count: float) -> str:
    """Return a number of bytes in decimal units: 1.20 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def parse_size(text: str | int) -> int:
    """Return the bytes of "8GiB", "500 MB" or a plain number. Raise UsageError."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([kmgt]?i?)b?", str(text).strip().lower())
    if match is None or match[2] not in _PREFIXES:
        raise UsageError(f"invalid size {text!r:.200}; write for example 8GiB or 500MB. Nothing was read")
    return int(float(match[1]) * _PREFIXES[match[2]])


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
    """Bytes done of a total, and the parameter being worked on. Bytes that are read but not yet written count half."""

    done: int
    total: int
    leaf: str


def ignore_progress(progress: Progress) -> None:
    """Report to nobody."""


class ByteMeter:
    """Adds up bytes read and bytes written, and reports their mean as progress; `ready` bytes were there before."""

    def __init__(self, report: Callable[[Progress], None], total: int, ready: int):
        self._report, self._total = report, total
        self._read = self._written = ready
        self._leaf = ""

    def add_read(self, leaf: str, nbytes: int) -> None:
        """Count `nbytes` of `leaf` that are in memory."""
        self._leaf = leaf
        self._read = min(self._read + nbytes, self._total)
        self.report()

    def add_written(self, nbytes: int) -> None:
        """Count `nbytes` that are safely on disk."""
        self._written += nbytes
        self._read = max(self._read, self._written)
        self.report()

    def report(self) -> None:
        """Report the current state."""
        self._report(Progress((self._read + self._written) // 2, self._total, self._leaf))


class Reporter:
    """A job's channel to its user, in lines: progress every few seconds, warnings, the error that ends it."""

    def __init__(self):
        self._start = self._last = time.monotonic()
        self._ready, self._total = 0, -1

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if self._total != progress.total:
            self._ready, self._total, self._start = progress.done, progress.total, now
            self._show_start(progress)
        if now - self._last >= INTERVAL or progress.done == progress.total:
            self._last = now
            rate = (progress.done - self._ready) / max(now - self._start, 1e-3)
            self._show(progress, rate, (progress.total - progress.done) / rate if rate > 0 else None)

    def _show_start(self, progress: Progress) -> None:
        if progress.done:
            self._write(f"continuing: {format_size(progress.done)} of {format_size(progress.total)} are there")

    def _show(self, progress: Progress, rate: float, seconds_left: float | None) -> None:
        left = "" if seconds_left is None else f"  {format_duration(seconds_left)} left"
        self._write(
            f"{100 * progress.done / max(progress.total, 1):5.1f} %  {format_size(progress.done)} of "
            f"{format_size(progress.total)}  {format_size(rate)}/s{left}  "
            f"memory {format_size(get_resident_memory())}  {progress.leaf}"
        )

    def event(self, name: str, **facts: Any) -> None:
        """Report an event that only programs are told."""

    def warning(self, message: str) -> None:
        """Report something to look into while the job goes on."""
        self._write(f"warning: {message}")

    def error(self, message: str, code: int) -> None:
        """Report why the job ends, with this exit code."""
        self._write(f"error: {message}")

    def final_message(self, message: str, code: int) -> bytes:
        """Return what a signal handler writes to stderr before it ends the process."""
        return f"\n{_encodable(message)}\n".encode()

    def close(self) -> None:
        """Restore the terminal."""

    def _write(self, line: str) -> None:
        print(_encodable(line), file=sys.stderr, flush=True)


class JsonReporter(Reporter):
    """Writes one JSON object a line."""

    def _show_start(self, progress: Progress) -> None:
        self.event("continue" if progress.done else "begin", done=progress.done, total=progress.total)

    def _show(self, progress: Progress, rate: float, seconds_left: float | None) -> None:
        self.event("progress", **progress._asdict(), rate=rate, eta_s=seconds_left, rss=get_resident_memory())

    def event(self, name: str, **facts: Any) -> None:
        self._write(json.dumps({"event": name, **facts}))

    def warning(self, message: str) -> None:
        self.event("warning", message=message)

    def error(self, message: str, code: int) -> None:
        self.event("error", message=message, code=code)

    def final_message(self, message: str, code: int) -> bytes:
        return json.dumps({"event": "interrupted", "message": message, "code": code}).encode() + b"\n"


class BarReporter(Reporter):
    """Shows one bar in bytes, and writes warnings above it."""

    def __init__(self):
        super().__init__()
        self._bar: Any = None

    def __call__(self, progress: Progress) -> None:
        if self._bar is None:
            self._bar = _make_bar()
            self._bar.start()
            self._task = self._bar.add_task("", total=progress.total, completed=progress.done, memory="")
        done = {"completed": progress.done, "total": progress.total, "description": progress.leaf}
        self._bar.update(self._task, **done, memory=f"memory {format_size(get_resident_memory())}")

    def warning(self, message: str) -> None:
        if self._bar is None:
            super().warning(message)
        else:
            self._bar.console.print(_encodable(f"warning: {message}"), markup=False, highlight=False)

    def error(self, message: str, code: int) -> None:
        self.close()
        super().error(message, code)

    def final_message(self, message: str, code: int) -> bytes:
        return b"\x1b[?25h" + super().final_message(message, code)  # show the cursor again

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def make_reporter(as_json: bool = False) -> Reporter:
    """Return JSON lines where they are asked for, a bar on a terminal, lines otherwise."""
    return JsonReporter() if as_json else BarReporter() if sys.stderr.isatty() else Reporter()


@contextlib.contextmanager
def show_slow(total: int, after: float = 3.0) -> Iterator[Callable[[int], None]]:
    """Yield a function that counts bytes done of `total`, by any thread. After some seconds a terminal shows them."""
    bar, start, done, lock = BarReporter(), time.monotonic(), 0, threading.Lock()

    def count(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            if time.monotonic() - start > after and sys.stderr.isatty():
                bar(Progress(done, total, ""))

    try:
        yield count
    finally:
        bar.close()


def _encodable(text: str) -> str:
    """Return `text` without control characters, and with escapes for what stderr's encoding does not have."""
    return printable(text).encode(sys.stderr.encoding or "ascii", "backslashreplace").decode(errors="replace")


def _make_bar() -> Any:
    """Return a bar on one line: the name gives way first, then the bar."""
    from rich import console, progress, table

    return progress.Progress(
        progress.TaskProgressColumn(),
        progress.BarColumn(bar_width=None, table_column=table.Column(ratio=1)),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[memory]}", markup=False),
        progress.TextColumn("{task.description}", markup=False, table_column=table.Column(ratio=1, no_wrap=True)),
        console=console.Console(stderr=True),
        transient=True,
        expand=True,
    )
