"""The commands of a chat: /help and the others."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import COMMAND_LINE, UsageError, pluralize, unknown
from ..generation.detokenizer import StopStrings
from ..generation.options import Sampling, check_option
from ..generation.sampler import bias_row
from ..system.files import expand_path
from . import conversation_file
from .chat_session import ChatSession
from .prompt_input import parse_sampling, read_text
from .terminal import shorten

FIELDS = [field.name for field in dataclasses.fields(Sampling)]
OPTIONS = ["max_new_tokens", "stop"]
SETTINGS = [*FIELDS, *OPTIONS]

LEAVE = ("/quit", "/bye")
"""The names that other programs give to /exit."""


class Quit(Exception):
    """The user leaves the chat."""


class SlashCommands:
    """The commands as methods on a chat."""

    def __init__(self, chat: ChatSession):
        self._chat, self._screen = chat, chat.screen
        self._saved: set[Path] = set()

    def run(self, line: str) -> bool:
        """Run a line that begins with /. Returns what `ChatSession.send` returns where the line sends a turn."""
        name, _, rest = line.strip().partition(" ")
        name = "/exit" if name in LEAVE else name
        if name not in COMMANDS:
            hint = shorten(unknown([name], COMMANDS)[0], 60)
            raise UsageError(f"unknown command {hint}; /help lists all (begin with a space to send it as text)")
        command, argument = COMMANDS[name], rest.strip()
        if argument and not command.usage:
            raise UsageError(f"{name} takes no arguments, but {shorten(argument, 40)!r} follows; nothing was done")
        return command.run(self, argument) is not False

    def help(self, _: str) -> None:
        rows = [*((f"{name} {command.usage}", command.help) for name, command in COMMANDS.items()), *KEYS]
        self._screen.note("\n".join(f"{usage:<24} {help}" for usage, help in rows))

    def clear(self, _: str) -> None:
        self._chat.update(messages=())
        self._screen.note("new conversation")

    def retry(self, _: str) -> bool:
        return self._chat.retry()

    def file(self, name: str) -> bool:
        return self._chat.send(read_text(_parse_path(name)))

    def undo(self, _: str) -> None:
        messages, last = self._chat.conversation.messages, self._chat.find_last_turn()
        self._chat.update(messages=messages[:last])
        self._screen.note(f"removed: {shorten(str(messages[last].get('content')), 60)}")

    def system(self, text: str) -> None:
        if not text:
            self._screen.note(f"system text: {self._chat.conversation.system or 'none'}")
            return
        self._chat.update(system=None if text == "-" else text)
        again = "; the conversation is read again with it (/clear starts a new one)"
        self._screen.note("system text set" + again * bool(self._chat.conversation.messages))

    def think(self, mode: str) -> None:
        if mode == "show":
            reasoning = [message.get("reasoning_content") for message in self._chat.conversation.messages]
            self._screen.note(next((text for text in reversed(reasoning) if text), "no reasoning yet"))
        elif mode in THINK_MODES:
            self._chat.update(thinking=mode != "off")
            self._chat.hide_reasoning = mode == "hide"
            self._screen.note(THINK_MODES[mode])
        else:
            raise UsageError("type /think on, off, hide or show")

    def set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if name and name not in SETTINGS:
            raise UsageError(f"no such setting: {shorten(unknown([name], SETTINGS)[0], 60)}; {', '.join(SETTINGS)}")
        if value:
            spelling = COMMAND_LINE.set(False)
            try:
                self._change(name, _parse_value(name, value.strip()))
            finally:
                COMMAND_LINE.reset(spelling)
        chat = self._chat
        values = {**{field: getattr(chat.sampling, field) for field in FIELDS}, **chat.options}
        shown = {setting: values.get(setting) for setting in ([name] if name else SETTINGS)}
        lines = (f"{key:<20} {'all' if value is None else json.dumps(value)}" for key, value in shown.items())
        self._screen.note("\n".join(lines))

    def _change(self, name: str, value: Any) -> None:
        if name in OPTIONS:
            if name == "stop":
                StopStrings(value)
            self._chat.options[name] = check_option(name, value, low=1)
            return
        sampling = dataclasses.replace(self._chat.sampling, **parse_sampling({name: value}))
        model = self._chat.session.model
        bias_row(sampling, model.cfg.vocab_size, model.origin.tokens or model.cfg.vocab_size)
        self._chat.sampling = sampling

    def save(self, name: str) -> None:
        messages, cache = conversation_file.name_files(_parse_path(name))
        replace = messages in self._saved
        conversation_file.save(messages, self._chat.conversation, self._chat.session, replace=replace)
        self._saved.add(messages)
        self._screen.note(f"saved {messages} (messages) and {cache} (KV cache)")

    def load(self, name: str) -> None:
        file, chat = _parse_path(name), self._chat
        conversation, session, reason = conversation_file.load(file, chat.session)
        chat.update(**{field.name: getattr(conversation, field.name) for field in dataclasses.fields(conversation)})
        chat.session = session
        self._saved.add(conversation_file.name_files(file)[0])
        turns = [str(message.get("content")) for message in conversation.messages if message["role"] == "user"]
        last = f"; the last: {shorten(turns[-1], 60)}" if turns else ""
        again = f"\nit will be read again: {reason}" if reason else ""
        self._screen.note(pluralize(len(turns), "turn") + last + again)
        chat.show_calls()

    def exit(self, _: str) -> None:
        raise Quit


def _parse_value(name: str, value: str) -> Any:
    """Return the value of a setting: JSON, text that is no JSON as a stop, or all as no limit."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        if name == "stop":
            return value
        if (name, value) == ("max_new_tokens", "all"):
            return None
        raise UsageError(f"/set {name} needs a number or a list, not {value!r:.60}") from None


def _parse_path(text: str) -> Path:
    if not text.strip():
        raise UsageError("which file? type its name after the command")
    return expand_path(text.strip())


class Command(NamedTuple):
    """Arguments, help line and method of a command."""

    usage: str
    help: str
    run: Callable[[SlashCommands, str], bool | None]


COMMANDS = {
    "/help": Command("", "this list", SlashCommands.help),
    "/clear": Command("", "start a new conversation", SlashCommands.clear),
    "/undo": Command("", "remove your last turn and its answer", SlashCommands.undo),
    "/retry": Command("", "answer your last turn again, with the next seed", SlashCommands.retry),
    "/file": Command("FILE", "send the text in a file", SlashCommands.file),
    "/system": Command("TEXT", "set the system text; - removes, alone shows it", SlashCommands.system),
    "/think": Command("on|off|hide|show", "think first; hide or show the reasoning", SlashCommands.think),
    "/set": Command("NAME VALUE", "as /set temperature 0.6; alone: show all values", SlashCommands.set),
    "/save": Command("FILE", "write FILE.json and FILE.safetensors", SlashCommands.save),
    "/load": Command("FILE", "continue a saved conversation", SlashCommands.load),
    "/exit": Command("", "leave", SlashCommands.exit),
}
KEYS = (
    ('"""', "starts and ends several lines; or end them with \\"),
    ("Ctrl-C", "stops the answer"),
    ("Ctrl-D", "leaves"),
)
THINK_MODES = {"on": "thinks first", "off": "answers at once", "hide": "thinks first, hidden"}
