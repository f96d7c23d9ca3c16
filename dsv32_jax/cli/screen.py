"""What goes to stdout and stderr: text that steers no terminal, dim lines, and one line that comes and goes."""

import contextlib
import json
import logging
import os
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any, TextIO

from ..errors import printable
from .wrapping import Wrapping

HARMLESS = "\n\t\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"
"""Not printable in Python's eyes, but part of ordinary text; so are the spaces of all scripts."""


def shown(text: str) -> str:
    """`text` as a terminal may have it: whatever could steer it is written as its escape."""
    return "".join(char if char in HARMLESS or unicodedata.category(char) == "Zs" else printable(char) for char in text)


def one_line(text: str, limit: int = 200) -> str:
    """The same for a name or a value: on one line, and not without end."""
    text = shown(text).replace("\n", "\\n").replace("\t", "\\t")
    return text if len(text) <= limit else text[: limit - 3] + "..."


def json_line(value: Any) -> str:
    """One line of JSON: scripts as they are, and whatever could steer a terminal as JSON's escape of it."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


class Screen:
    """Results go to stdout, everything else to stderr. Often both are one terminal, so they are written by one object.

    On a terminal results are `shown`; into a file or a pipe they go as they are. `quiet`: errors alone go to stderr.
    """

    def __init__(self, *, quiet: bool = False):
        self._out, self._err, self._quiet = sys.stdout, sys.stderr, quiet
        self._in_line = self._has_status = False
        self.live = self._err.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._styled = self.live and not os.environ.get("NO_COLOR")

    @property
    def width(self) -> int:
        """Columns of a line of results: those of the terminal but one, which the space behind a line's last word needs
        (else it would begin a line of its own); no end of them in a file or a pipe."""
        return _columns() - 1 if self._out.isatty() else sys.maxsize

    def fit(self, text: str) -> str:
        """`text` as results are written."""
        return shown(text) if self._out.isatty() else text

    def result(self, text: str) -> None:
        """Write a part of the result, and at once."""
        if not text:
            return
        self.status("")
        self._write(self._out, self.fit(text))
        self._in_line = text[-1] != "\n"

    def note(self, text: str = "") -> None:
        """Write lines about the result, dimmed on a terminal and broken between words."""
        self.alongside(self._wrapped(shown(text)) + "\n")

    def alongside(self, text: str) -> None:
        """Write a part of such lines."""
        if self._quiet:
            return
        self.status("")
        self._end_line()
        self._write(self._err, self.dim(shown(text)))

    def strong(self, text: str) -> None:
        """Write a line about the result that a reader must not miss."""
        self.status("")
        self._end_line()
        self._write(self._err, self.bold(self._wrapped(shown(text))) + "\n")

    def status(self, text: str) -> None:
        """Show `text` in a line that the next output replaces; on a terminal only, not in the middle of a result."""
        if self._quiet or not self.live or not (text or self._has_status) or self._in_line:
            return
        self._has_status = bool(text)
        self._write(self._err, "\r\x1b[K" + self.dim(one_line(text, _columns() - 1) if text else ""))

    def dim(self, text: str) -> str:
        """`text` in dim letters, where there are any."""
        return f"\x1b[2m{text}\x1b[22m" if self._styled and text else text

    def bold(self, text: str) -> str:
        """`text` in bold letters, where there are any."""
        return f"\x1b[1m{text}\x1b[22m" if self._styled else text

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside the `with`, what the library logs is shown: as the status, or a note where there is none."""
        log, handler = logging.getLogger("dsv32_jax"), _Notes(self)
        log.addHandler(handler)
        before, log.propagate = log.propagate, False
        try:
            yield
        finally:
            self.status("")
            log.removeHandler(handler)
            log.propagate = before

    def _wrapped(self, text: str) -> str:
        """`text` in lines that fit on the terminal."""
        if not self._err.isatty():
            return text
        wrapping = Wrapping(_columns() - 1)
        return wrapping.add(text) + wrapping.end()

    def _end_line(self) -> None:
        """Where a result stands in the middle of a line, go on below it."""
        if self._in_line and self._out.isatty():
            self._write(self._out, "\n")
        self._in_line = False

    @staticmethod
    def _write(stream: TextIO, text: str) -> None:
        encoding = stream.encoding or "utf-8"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()


def _columns() -> int:
    return shutil.get_terminal_size().columns


class _Notes(logging.Handler):
    def __init__(self, screen: Screen):
        super().__init__()
        self._screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        tell = self._screen.status if self._screen.live else self._screen.note
        tell(record.getMessage())
