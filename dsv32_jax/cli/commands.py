"""What can be typed in a chat besides turns: /help and the others."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..errors import UsageError
from ..generation.options import Sampling
from ..generation.request import used
from ..generation.sampling_params import bias
from ..system.files import expand_path
from . import conversation_file
from .chat_session import Talk
from .prompt_input import sampling_of, text_of
from .screen import one_line

WIDE = 79
"""Columns from which on /help is a table."""


class Leave(Exception):
    """The chat is over."""


class Command(NamedTuple):
    """What is written behind the name, what the command is for, and what does it."""

    usage: str
    help: str
    do: Callable[["Commands", str], None]


class Commands:
    """Does commands to a talk."""

    def __init__(self, talk: Talk):
        self._talk = talk
        self._known: set[Path] = set()

    def do(self, line: str) -> bool:
        """Do what a line that begins with / says. Returns what `Talk.say` returns where the line sends a turn."""
        name, _, rest = line.strip().partition(" ")
        if name == "/file":
            return self._talk.say(text_of(_path(rest)))
        if name not in TABLE:
            raise UsageError(
                f"there is no {one_line(name, 40)}; /help lists the commands (a space in front sends it as text)"
            )
        if rest.strip() and not TABLE[name].usage:
            raise UsageError(
                f"{name} stands alone; it was not done, because {one_line(rest.strip(), 40)!r} is behind it"
            )
        TABLE[name].do(self, rest.strip())
        return True

    def help(self, _: str) -> None:
        lines = [(f"{name} {command.usage}", command.help) for name, command in TABLE.items()]
        width, screen = max(len(usage) for usage, _ in lines), self._talk.screen
        for usage, help in [*lines, *KEYS]:
            screen.note(f"{usage:<{width}}  {help}" if screen.width >= WIDE else f"{usage}\n    {help}")

    def reset(self, _: str) -> None:
        self._talk.change(messages=())
        self._talk.screen.note("a new conversation")

    def undo(self, _: str) -> None:
        messages = self._talk.conversation.messages
        turns = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if not turns:
            raise UsageError("there is nothing to take back")
        self._talk.change(messages=messages[: turns[-1]])
        self._talk.screen.note(f"taken back: {one_line(str(messages[turns[-1]].get('content')), 60)}")

    def system(self, text: str) -> None:
        if text:
            self._talk.change(system=None if text == "-" else text)
            goes_on = "the conversation goes on under it and is read again (/reset begins anew)"
            self._talk.screen.note(goes_on if self._talk.conversation.messages else "the conversation begins with it")
        else:
            self._talk.screen.note(f"system text: {self._talk.conversation.system or 'none'}")

    def think(self, word: str) -> None:
        talk = self._talk
        if word == "show":
            said = [message.get("reasoning_content") for message in talk.conversation.messages]
            talk.screen.note(next((text for text in reversed(said) if text), "nothing was thought yet"))
            return
        if word not in ("on", "off", "hide"):
            raise UsageError("it is /think on, off, hide or show")
        talk.change(thinking=word != "off")
        talk.hides = word == "hide"
        talk.screen.note({"off": "answers at once", "on": "thinks first", "hide": "thinks first, unseen"}[word])

    def set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if not name:
            chosen = _chosen(self._talk.sampling)
            self._talk.screen.note(
                json.dumps(chosen) if chosen else f"all as by default; there are {', '.join(FIELDS)}"
            )
            return
        if name not in FIELDS:
            raise UsageError(f"there is no {one_line(name, 40)!r} to set; there are {', '.join(FIELDS)}")
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            raise UsageError(f"/set {name} needs a number or a list, not {value!r:.60}") from None
        sampling = dataclasses.replace(self._talk.sampling, **sampling_of({name: found}))
        model = self._talk.session.model
        bias(sampling, model.cfg.vocab_size, used(model))
        self._talk.sampling = sampling
        self._talk.screen.note(json.dumps(_chosen(self._talk.sampling)))

    def save(self, name: str) -> None:
        file, talk = _path(name), self._talk
        written = conversation_file.files(file)
        replace = written[0] in self._known
        conversation_file.save(file, talk.conversation, talk.session, replace=replace)
        self._known.add(written[0])
        talk.screen.note(f"saved {written[0]} (messages) and {written[1]} (what the model has read)")

    def load(self, name: str) -> None:
        file, talk = _path(name), self._talk
        conversation, found, why = conversation_file.load(file, talk.session)
        talk.change(**{field.name: getattr(conversation, field.name) for field in dataclasses.fields(conversation)})
        talk.session = found
        self._known.add(conversation_file.files(file)[0])
        said = [str(message.get("content")) for message in conversation.messages if message["role"] == "user"]
        turns = f"{len(said)} turn{'s' * (len(said) != 1)}"
        last = f"; the last: {one_line(said[-1], 60)}" if said else ""
        talk.screen.note(turns + last + (f"\nit will be read again: {why}" if why else ""))
        talk.show_calls()

    def quit(self, _: str) -> None:
        raise Leave


def _path(text: str) -> Path:
    if not text.strip():
        raise UsageError("which file? write its name behind the command")
    return expand_path(text.strip())


def _chosen(sampling: Sampling) -> dict:
    """What is not as by default."""
    fields = dataclasses.fields(Sampling)
    plain = Sampling()
    return {f.name: value for f in fields if (value := getattr(sampling, f.name)) != getattr(plain, f.name)}


FIELDS = [field.name for field in dataclasses.fields(Sampling)]

TABLE = {
    "/help": Command("", "this list", Commands.help),
    "/reset": Command("", "begin a new conversation", Commands.reset),
    "/undo": Command("", "take your last turn back", Commands.undo),
    "/system": Command("TEXT", "set the system text; - for none, alone: show it", Commands.system),
    "/think": Command("on|off|hide|show", "think first; unseen; show the last thoughts", Commands.think),
    "/set": Command("NAME VALUE", "as /set temperature 0.6; alone: show what is set", Commands.set),
    "/save": Command("FILE", "write the conversation to FILE.json, FILE.safetensors", Commands.save),
    "/load": Command("FILE", "go on with a saved one", Commands.load),
    "/quit": Command("", "leave", Commands.quit),
}
KEYS = (
    ("/file FILE", "send the text in a file"),
    ('"""', "begins and ends several lines; or end them with \\"),
    ("Ctrl-C", "stops the answer"),
    ("Ctrl-D", "leaves"),
)
