"""The terminal: results on stdout, notes and a status line on stderr, and turns that a person types or pipes in.

Nothing that is written steers a terminal.
"""

import contextlib
import importlib
import json
import logging
import os
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import UsageError, printable
from ..system.files import find_user_folder
from ..system.progress import Meter, Progress
from ..system.reporter import INTERVAL

FENCE = '"""'
"""Starts and ends a text of several lines."""

HISTORY_LINES = 2000


def shorten(text: str, limit: int = 200) -> str:
    """Return a name or a value as `printable` text on one line, cut at `limit` characters."""
    text = printable(text).replace("\n", "\\n").replace("\t", "\\t")
    return text if len(text) <= limit else text[: limit - 3] + "..."


def format_json(value: Any) -> str:
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
        self._meter, self._noted = Meter(), time.monotonic()

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

        content = Text(shorten(text, self._err.width - 3), style="dim")
        if self._status is None:
            self._status = self._err.status(content)
            self._status.start()
        else:
            self._status.update(content)

    def progress(self, progress: Progress) -> None:
        """Show how far a part of the command is: in the status, or where there is none in a note every half minute."""
        if self._meter.update(progress):
            self._noted = time.monotonic()
        if self._err.is_interactive:
            self.status("" if progress.is_complete else self._meter.describe(self._err.width - 3))
        elif time.monotonic() - self._noted >= INTERVAL:
            self._noted = time.monotonic()
            self.note(self._meter.describe())

    @contextlib.contextmanager
    def show_log(self) -> Iterator[None]:
        """Inside the `with`, show what the library logs as the status, or as notes where there is none."""
        log, handler = logging.getLogger("dsv32_jax"), logging.Handler()
        show = self.status if self._err.is_interactive else self.note
        handler.emit = lambda record: show(record.getMessage())
        log.addHandler(handler)
        propagate, log.propagate = log.propagate, False
        level, _ = log.level, log.setLevel(logging.INFO)
        try:
            yield
        finally:
            self.status("")
            log.removeHandler(handler)
            log.propagate = propagate
            log.setLevel(level)

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


class Keyboard:
    """Read turns from stdin. Line editing and prompts exist on a terminal only."""

    def __init__(self, screen: Screen):
        self._screen = screen
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._readline: ModuleType | None = None
        if self.interactive:
            with contextlib.suppress(ImportError):
                self._readline = importlib.import_module("readline")

    def read_turn(self, prompt: str) -> str:
        """Return one turn, one entry of the history. Raises EOFError at the end of the input, KeyboardInterrupt."""
        before = self._readline.get_current_history_length() if self._readline else 0
        text = self._read_lines(prompt)
        if self._readline and (after := self._readline.get_current_history_length()) > before + 1:
            for item in reversed(range(before, after)):
                self._readline.remove_history_item(item)
            self._readline.add_history(text)
        return text

    def _read_lines(self, prompt: str) -> str:
        line = self._read_line(prompt)
        if not line.lstrip().startswith(FENCE):
            while line.endswith("\\") and self.interactive:
                line = line[:-1] + "\n" + self._read_line("... ")
            return line
        lines = [line.lstrip().removeprefix(FENCE)]
        while FENCE not in lines[-1]:
            lines.append(self._read_line("... "))
        lines[-1] = lines[-1][: lines[-1].index(FENCE)]
        first, last = lines[0] == "" and len(lines) > 1, lines[-1] == "" and len(lines) > 2
        return "\n".join(lines[first : len(lines) - last])

    def _read_line(self, prompt: str) -> str:
        try:
            line = input(prompt) + "\n" if self.interactive else sys.stdin.readline()
            line.encode()
        except UnicodeDecodeError as error:
            raise UsageError(f"the input is not {error.encoding}: {error}") from None
        except UnicodeEncodeError as error:
            byte = ord(line[error.start]) & 0xFF
            raise UsageError(f"the input is not UTF-8: character {error.start} is the byte 0x{byte:02x}") from None
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    @contextlib.contextmanager
    def echo_off(self) -> Iterator[None]:
        """Inside the `with`, hide what is typed; it remains for the next turn."""
        if not self.interactive:
            yield
            return
        before = termios.tcgetattr(sys.stdin)
        after = [*before]
        after[3] &= ~termios.ECHO
        termios.tcsetattr(sys.stdin, termios.TCSANOW, after)
        try:
            yield
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSANOW, before)

    @contextlib.contextmanager
    def use_history(self, commands: Sequence[str], keep: bool) -> Iterator[None]:
        """Inside the `with`, recall earlier turns and complete `commands`; write the history at the end if `keep`."""
        if self._readline is None:
            yield
            return
        readline, folder = self._readline, find_user_folder("XDG_STATE_HOME", ".local/state")
        readline.set_completer(
            lambda text, i: [*(name for name in commands if text[:1] == "/" and name.startswith(text)), None][i]
        )
        readline.set_completer_delims("")
        readline.parse_and_bind("tab: complete")
        readline.parse_and_bind("set enable-bracketed-paste on")
        if folder is not None:
            with contextlib.suppress(FileNotFoundError):
                readline.read_history_file(folder / "chat_history")
        try:
            yield
        finally:
            if keep and folder is not None:
                self._write_history(readline, folder / "chat_history")

    def _write_history(self, readline: ModuleType, file: Path) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
            readline.set_history_length(HISTORY_LINES)
            readline.write_history_file(file)
        except OSError as error:
            self._screen.note(f"history was not saved: {error}")
