"""A job's progress on stderr: a line that changes on a terminal, lines in a log, or JSON lines for a program."""

import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import printable
from .host import get_resident_memory
from .progress import Meter, Progress

INTERVAL = 30.0
"""Seconds between two lines of a log."""


class Reporter:
    """Reports a job in lines: progress every half minute, warnings, the error that ends it."""

    def __init__(self):
        self.meter = Meter()
        self._last = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        if self.meter.update(progress):
            self._show_start(progress)
        if time.monotonic() - self._last >= INTERVAL or progress.is_complete:
            self._last = time.monotonic()
            self._show()

    def _show_start(self, progress: Progress) -> None:
        if progress.saved:
            self._write(f"continuing: {self.meter.describe_saved()}")

    def _show(self) -> None:
        self._write(self.meter.describe())

    def stage(self, text: str) -> None:
        """Say what is done before there is progress, on a terminal."""
        self.meter.stage = text

    def event(self, name: str, **facts: Any) -> None:
        """Report an event, to programs alone."""

    def warning(self, message: str) -> None:
        """Report something to look into while the job goes on."""
        self._write(f"warning: {message}")

    def final_message(self, message: str, code: int) -> bytes:
        """Return what a signal handler writes to stderr before it ends the process."""
        return f"\n{escape_unencodable(message)}\n".encode()

    def close(self) -> None:
        """Restore the terminal."""

    def _write(self, line: str) -> None:
        print(escape_unencodable(line), file=sys.stderr, flush=True)


class JsonReporter(Reporter):
    """Writes one JSON object a line."""

    def _show_start(self, progress: Progress) -> None:
        self.event("continue" if progress.saved else "begin", done=progress.done, total=progress.total)

    def _show(self) -> None:
        assert self.meter.progress is not None
        facts = {"rate": self.meter.rate, "seconds_left": self.meter.seconds_left, "memory": get_resident_memory()}
        self.event("progress", **self.meter.progress._asdict(), **facts)

    def event(self, name: str, **facts: Any) -> None:
        self._write(json.dumps({"event": name, **facts}))

    def warning(self, message: str) -> None:
        self.event("warning", message=message)

    def final_message(self, message: str, code: int) -> bytes:
        return json.dumps({"event": "interrupted", "message": message, "code": code}).encode() + b"\n"


class BarReporter(Reporter):
    """Shows one line that changes, and writes warnings above it."""

    def __init__(self):
        super().__init__()
        self._live: Any = None

    def __call__(self, progress: Progress) -> None:
        self.meter.update(progress)
        self._open()

    def stage(self, text: str) -> None:
        super().stage(text)
        self._open()

    def warning(self, message: str) -> None:
        if self._live is None:
            super().warning(message)
        else:
            self._live.console.print(escape_unencodable(f"warning: {message}"), markup=False, highlight=False)

    def final_message(self, message: str, code: int) -> bytes:
        return b"\x1b[?25h" + super().final_message(message, code)  # show the cursor again

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _open(self) -> None:
        if self._live is None:
            from rich import console, live, text

            def draw() -> text.Text:
                width = terminal.width - 1
                line = escape_unencodable(self.meter.describe(width), terminal.encoding)
                return text.Text(line, no_wrap=True, overflow="crop")

            terminal = console.Console(stderr=True, emoji=False)
            self._live = live.Live(get_renderable=draw, console=terminal, transient=True, refresh_per_second=4)
            self._live.start()


def make_reporter(as_json: bool = False) -> Reporter:
    """Return JSON lines where they are asked for, a changing line on a terminal, lines otherwise."""
    return JsonReporter() if as_json else BarReporter() if sys.stderr.isatty() else Reporter()


@contextlib.contextmanager
def show_slow(total: int, after: float = 1.0, unit: str = "B") -> Iterator[Callable[[int], None]]:
    """Yield a function that counts what is done of `total`, by any thread. It is shown where the `with` takes more than
    `after` seconds on a terminal, more than INTERVAL elsewhere."""
    reporter, start, done, lock = make_reporter(), time.monotonic(), 0, threading.Lock()
    after = after if isinstance(reporter, BarReporter) else INTERVAL

    def count(amount: int) -> None:
        nonlocal done
        with lock:
            done += amount
            if time.monotonic() - start >= after:
                reporter(Progress(done, total, unit=unit))

    timer = threading.Timer(after, count, [0])
    timer.daemon = True
    timer.start()
    try:
        yield count
    finally:
        timer.cancel()
        with lock:
            after = math.inf
            reporter.close()


def escape_unencodable(text: str, encoding: str | None = None) -> str:
    """Return `text` without control characters, and with escapes for what an encoding, stderr's, does not have."""
    known: str = encoding or sys.stderr.encoding or "ascii"
    return printable(text).encode(known, "backslashreplace").decode(known, errors="replace")
