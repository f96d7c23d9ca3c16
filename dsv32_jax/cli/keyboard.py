"""What a person types: lines with editing and history, texts of several lines, or what is piped in."""

import contextlib
import importlib
import os
import sys
import termios
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from ..errors import UsageError
from ..system.files import find_user_folder
from .screen import Screen

FENCE = '"""'
"""Begins and ends a text of several lines."""

REMEMBERED = 2000
"""Lines of history that are kept."""


class Keyboard:
    """Reads turns. On a terminal with line editing, where Python has it; prompts are written only there."""

    def __init__(self, screen: Screen):
        self._screen = screen
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._readline = _readline() if self.interactive else None

    def read(self, prompt: str) -> str:
        """One turn, which history recalls as one. Raises EOFError at the end of the input, KeyboardInterrupt on
        Ctrl-C."""
        before = self._readline.get_current_history_length() if self._readline else 0
        text = self._turn(prompt)
        if self._readline and (after := self._readline.get_current_history_length()) > before + 1:
            for item in reversed(range(before, after)):
                self._readline.remove_history_item(item)
            self._readline.add_history(text)
        return text

    def _turn(self, prompt: str) -> str:
        line = self._line(prompt)
        if line.lstrip().startswith(FENCE):
            return self._fenced(line.lstrip().removeprefix(FENCE))
        while line.endswith("\\") and self.interactive:
            line = line[:-1] + "\n" + self._line("... ")
        return line

    def _fenced(self, line: str) -> str:
        lines = []
        while FENCE not in line:
            lines.append(line)
            line = self._line("... ")
        lines.append(line[: line.index(FENCE)])
        first, last = lines[0] == "" and len(lines) > 1, lines[-1] == "" and len(lines) > 2
        return "\n".join(lines[first : len(lines) - last])

    def _line(self, prompt: str) -> str:
        try:
            line = input(self._styled(prompt)) + "\n" if self.interactive else sys.stdin.readline()
            line.encode()
        except UnicodeDecodeError as error:
            raise UsageError(f"what came in is not {error.encoding}: {error}") from None
        except UnicodeEncodeError as error:
            byte = ord(line[error.start]) & 0xFF
            raise UsageError(f"what came in is not UTF-8: character {error.start} is the byte 0x{byte:02x}") from None
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    @contextlib.contextmanager
    def hushed(self) -> Iterator[None]:
        """Inside the `with`, what is typed does not appear; it is there for the next turn."""
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

    def _styled(self, prompt: str) -> str:
        """The prompt in bold; readline is told which of it takes no room."""
        plain = prompt.rstrip(" ")
        before, _, after = self._screen.bold("\0").partition("\0")
        hidden = ("\x01", "\x02") if self._readline and before else ("", "")
        marks = [mark and hidden[0] + mark + hidden[1] for mark in (before, after)]
        return marks[0] + plain + marks[1] + " " * (len(prompt) - len(plain))

    @contextlib.contextmanager
    def remembering(self, commands: Sequence[str], keep: bool) -> Iterator[None]:
        """Inside the `with`, earlier turns are at hand and commands are completed; what is typed is kept if `keep`."""
        if self._readline is None:
            yield
            return
        readline, folder = self._readline, find_user_folder("XDG_STATE_HOME", ".local/state")
        readline.set_completer(lambda text, i: [name for name in [*commands, None] if _fits(name, text)][i])
        readline.set_completer_delims("")
        readline.parse_and_bind("tab: complete")
        readline.parse_and_bind("set enable-bracketed-paste on")
        file = folder and folder / "chat_history"
        with contextlib.suppress(FileNotFoundError):
            if file is not None:
                readline.read_history_file(file)
        try:
            yield
        finally:
            if keep and file is not None:
                self._keep(readline, file)

    def _keep(self, readline: ModuleType, file: Path) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
            readline.set_history_length(REMEMBERED)
            readline.write_history_file(file)
        except OSError as error:
            self._screen.note(f"what you typed was not kept: {error}")


def _fits(name: str | None, text: str) -> bool:
    return name is None or (text.startswith("/") and name.startswith(text))


def _readline() -> ModuleType | None:
    try:
        return importlib.import_module("readline")
    except ImportError:
        return None
