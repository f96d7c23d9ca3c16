"""How far a conversion is, on stderr: a bar for a terminal, lines for a log, JSON for a program."""

import contextlib
import json
import sys
import time
from typing import Any, Protocol

from .job import Progress

INTERVAL = 5.0
"""Seconds between two lines of a log."""


class Watcher(Protocol):
    """What the command line tells its user, and where."""

    def __call__(self, progress: Progress) -> None: ...

    def error(self, message: str) -> None: ...

    def close(self) -> None: ...


class Lines:
    """A line every few seconds."""

    def __init__(self):
        self._said = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._said >= INTERVAL or progress.done == progress.total:
            self._said = now
            self._say(progress)

    def _say(self, progress: Progress) -> None:
        percent = 100 * progress.done / max(progress.total, 1)
        print(
            f"{percent:5.1f} %  {size_text(progress.done)} of {size_text(progress.total)}  {progress.leaf}",
            file=sys.stderr,
            flush=True,
        )

    def error(self, message: str) -> None:
        print(f"error: {message}", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class JsonLines(Lines):
    """The same as one JSON object a line."""

    def _say(self, progress: Progress) -> None:
        self._write({"event": "progress", **progress._asdict()})

    def error(self, message: str) -> None:
        self._write({"event": "error", "message": message})

    def _write(self, event: dict[str, Any]) -> None:
        print(json.dumps(event), file=sys.stderr, flush=True)


class Bar(Lines):
    """One bar in bytes."""

    def __init__(self):
        super().__init__()
        self._stack = contextlib.ExitStack()
        self._bar: Any = None

    def __call__(self, progress: Progress) -> None:
        if self._bar is None:
            self._bar = self._stack.enter_context(_rich_bar())
            self._task = self._bar.add_task("", total=progress.total)
        self._bar.update(self._task, completed=progress.done, description=progress.leaf)

    def error(self, message: str) -> None:
        self.close()
        super().error(message)

    def close(self) -> None:
        self._stack.close()


def size_text(count: int) -> str:
    """Bytes in decimal units."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def _rich_bar() -> Any:
    from rich import console, progress

    return progress.Progress(
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.description}", markup=False),
        console=console.Console(stderr=True),
        transient=True,
    )
