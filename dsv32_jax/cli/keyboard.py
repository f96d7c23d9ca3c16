"""Turns as a person types them, with line editing and history, or as they are piped in."""

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
"""Starts and ends a text of several lines."""

HISTORY_LINES = 2000


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
        """Return one turn, which becomes one entry of the history. Raises EOFError at the end of the input,
        KeyboardInterrupt on Ctrl-C."""
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
