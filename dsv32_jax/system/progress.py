"""How far a conversion is, on stderr: a bar for a terminal, lines for a log, JSON for a program."""

import contextlib
import json
import os
import sys
import time
from typing import Any, NamedTuple, Protocol

from .meter import Progress
from .quantities import duration_text, size_text

INTERVAL = 10.0
"""Seconds between two lines of a log."""


class Pace(NamedTuple):
    """Bytes a second since the start, seconds to the end (None before anything is known), bytes of memory in use."""

    rate: float
    eta_s: float | None
    rss: int


class Watcher(Protocol):
    """What the command line tells its user, and where."""

    def __call__(self, progress: Progress) -> None: ...

    def event(self, name: str, **facts: Any) -> None: ...

    def warning(self, message: str) -> None: ...

    def error(self, message: str, code: int) -> None: ...

    def last_words(self, message: str, code: int) -> bytes: ...

    def close(self) -> None: ...


class Lines:
    """A line every few seconds."""

    def __init__(self):
        self._began = self._said = time.monotonic()
        self._ready, self._total = 0, -1

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if self._total != progress.total:
            self._ready, self._total, self._began = progress.done, progress.total, now
            self._begin(progress)
        if now - self._said >= INTERVAL or progress.done == progress.total:
            self._said = now
            self._say(progress, self._pace(progress, now))

    def _begin(self, progress: Progress) -> None:
        if progress.done:
            self._write(f"continuing: {size_text(progress.done)} of {size_text(progress.total)} are there")

    def _pace(self, progress: Progress, now: float) -> Pace:
        rate = (progress.done - self._ready) / max(now - self._began, 1e-3)
        left = (progress.total - progress.done) / rate if rate > 0 else None
        return Pace(rate, left, resident())

    def _say(self, progress: Progress, pace: Pace) -> None:
        percent = 100 * progress.done / max(progress.total, 1)
        left = "" if pace.eta_s is None else f"  {duration_text(pace.eta_s)} left"
        self._write(
            f"{percent:5.1f} %  {size_text(progress.done)} of {size_text(progress.total)}  "
            f"{size_text(pace.rate)}/s{left}  memory {size_text(pace.rss)}  {progress.leaf}"
        )

    def event(self, name: str, **facts: Any) -> None:
        """What happened besides progress: of interest to programs."""

    def warning(self, message: str) -> None:
        """What a person may want to look after while the work goes on."""
        self._write(f"warning: {message}")

    def error(self, message: str, code: int) -> None:
        self._write(f"error: {message}")

    def last_words(self, message: str, code: int) -> bytes:
        """What is left to be said when the process is about to be gone."""
        return f"\n{_ascii(message)}\n".encode()

    def close(self) -> None:
        pass

    def _write(self, line: str) -> None:
        print(_ascii(line), file=sys.stderr, flush=True)


class JsonLines(Lines):
    """The same as one JSON object a line."""

    def event(self, name: str, **facts: Any) -> None:
        self._write(json.dumps({"event": name, **facts}))

    def _begin(self, progress: Progress) -> None:
        self.event("continue" if progress.done else "begin", done=progress.done, total=progress.total)

    def _say(self, progress: Progress, pace: Pace) -> None:
        self.event("progress", **progress._asdict(), **pace._asdict())

    def warning(self, message: str) -> None:
        self.event("warning", message=message)

    def error(self, message: str, code: int) -> None:
        self.event("error", message=message, code=code)

    def last_words(self, message: str, code: int) -> bytes:
        return json.dumps({"event": "interrupted", "message": message, "code": code}).encode() + b"\n"


class Bar(Lines):
    """One bar in bytes."""

    def __init__(self):
        super().__init__()
        self._stack = contextlib.ExitStack()
        self._bar: Any = None

    def __call__(self, progress: Progress) -> None:
        if self._bar is None:
            self._bar = self._stack.enter_context(_rich_bar())
            self._task = self._bar.add_task("", total=progress.total, completed=progress.done, memory="")
        memory = f"memory {size_text(resident())}"
        done = {"completed": progress.done, "total": progress.total, "description": progress.leaf}
        self._bar.update(self._task, **done, memory=memory)

    def warning(self, message: str) -> None:
        if self._bar is None:
            super().warning(message)
        else:
            self._bar.console.print(_ascii(f"warning: {message}"), markup=False, highlight=False)

    def error(self, message: str, code: int) -> None:
        self.close()
        super().error(message, code)

    def last_words(self, message: str, code: int) -> bytes:
        """The bar had hidden the cursor."""
        return b"\x1b[?25h" + super().last_words(message, code)

    def close(self) -> None:
        self._stack.close()


def resident() -> int:
    """Bytes of memory that this process has now."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _ascii(text: str) -> str:
    """`text` without what a console may not be able to print, or may take for a command; lines stay lines."""
    shown = (char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)
    return "".join(shown).encode(sys.stderr.encoding or "ascii", "backslashreplace").decode(errors="replace")


def _rich_bar() -> Any:
    from rich import console, progress

    return progress.Progress(
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[memory]}", markup=False),
        progress.TextColumn("{task.description}", markup=False),
        console=console.Console(stderr=True),
        transient=True,
    )
