"""Output of the commands: results on stdout, notes and a status line on stderr, and nothing that steers a terminal."""

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from ..errors import printable


def one_line(text: str, limit: int = 200) -> str:
    """Return a name or a value as `printable` text on one line, cut at `limit` characters."""
    text = printable(text).replace("\n", "\\n").replace("\t", "\\t")
    return text if len(text) <= limit else text[: limit - 3] + "..."


def json_line(value: Any) -> str:
    """Return one line of JSON that keeps all scripts and escapes whatever could steer a terminal."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


class Screen:
    """Write results to stdout and everything else to stderr. One object writes both, as both may be one terminal.

    Results are `printable` on a terminal and verbatim in a file or a pipe. `quiet` leaves only errors on stderr.
    """

    def __init__(self, *, quiet: bool = False):
        from rich.console import Console

        self._out, self._quiet = sys.stdout, quiet
        styles = None if os.environ.get("NO_COLOR") else "auto"
        self._err = Console(file=sys.stderr, color_system=styles, markup=False, emoji=False, highlight=False)
        self._status: Any = None
        self._in_line = False

    def result(self, text: str) -> None:
        """Write a part of the result at once."""
        if text:
            self.status("")
            self._write_result(printable(text) if self._out.isatty() else text)
            self._in_line = text[-1] != "\n"

    def note(self, text: str = "", *, important: bool = False) -> None:
        """Write lines about the result: dim and silent if quiet, or `important`."""
        if important or not self._quiet:
            self._finish_line()
            style = "bold" if important else "dim"
            self._err.print(printable(text), style=style, soft_wrap=not self._err.is_terminal)

    def aside(self, text: str) -> None:
        """Write a part of such lines at once."""
        if text and not self._quiet:
            self._finish_line()
            self._err.out(printable(text), style="dim", end="", highlight=False)

    def status(self, text: str) -> None:
        """Show what is going on in a line that the next output replaces, on a terminal only; "" clears it."""
        if not text and self._status is not None:
            self._status.stop()
            self._status = None
        if not text or self._in_line or self._quiet or not self._err.is_interactive:
            return
        from rich.text import Text

        content = Text(one_line(text, self._err.width - 3), style="dim")
        if self._status is None:
            self._status = self._err.status(content)
            self._status.start()
        else:
            self._status.update(content)

    @contextlib.contextmanager
    def show_log(self) -> Iterator[None]:
        """Inside the `with`, show what the library logs as the status, or as notes where there is none."""
        log, handler = logging.getLogger("dsv32_jax"), logging.Handler()
        show = self.status if self._err.is_interactive else self.note
        handler.emit = lambda record: show(record.getMessage())
        log.addHandler(handler)
        propagate, log.propagate = log.propagate, False
        try:
            yield
        finally:
            self.status("")
            log.removeHandler(handler)
            log.propagate = propagate

    def _finish_line(self) -> None:
        """Clear the status, and end a line of results that stands unfinished on the terminal."""
        self.status("")
        if self._in_line and self._out.isatty():
            self._write_result("\n")
        self._in_line = False

    def _write_result(self, text: str) -> None:
        encoding = self._out.encoding or "utf-8"
        self._out.write(text.encode(encoding, "backslashreplace").decode(encoding))
        self._out.flush()
