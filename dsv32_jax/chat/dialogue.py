"""Which message stands where: what decides how each of them is written."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import UsageError
from . import template
from .faults import EncodingError, Fault
from .messages import Message, kind
from .template import Mark

ROLES = ("system", "user", "developer", "assistant", "tool")

LATE_DEVELOPER = (
    "a developer message before a later user or developer message has no place in a thinking prompt; "
    "use drop_thinking=False, or chat mode"
)


def no_role(role: str) -> str:
    """That there is no such role."""
    return f"unknown role {role[:40]!r}; the roles are {', '.join(ROLES)}"


def listed(messages: Any, name: str) -> list[Message]:
    """`messages`, where it is a list of objects."""
    if isinstance(messages, str):
        raise UsageError(
            f"{name} must be a list of messages, not a string: use [{{'role': 'user', 'content': ...}}] to chat, or "
            "the tokenizer's encode to continue raw text"
        )
    if not isinstance(messages, Sequence) or isinstance(messages, bytes):
        raise UsageError(f"{name} must be a list of messages, not a {kind(messages)}")
    faults = [
        Fault(
            "message_not_object", i if name == "messages" else None, f"{name}[{i}] is a {kind(message)}, not an object"
        )
        for i, message in enumerate(messages)
        if not isinstance(message, Mapping)
    ]
    if faults:
        raise EncodingError(faults)
    return list(messages)


class Dialogue(NamedTuple):
    """All messages, their roles, where the last user or developer message is (-1: nowhere), and the mode."""

    turns: list[Message]
    roles: list[str]
    last: int
    thinking: bool

    @classmethod
    def of(cls, turns: list[Message], thinking: bool) -> "Dialogue":
        spoken = [role if isinstance(role := turn.get("role"), str) else repr(role) for turn in turns]
        last = max((i for i, role in enumerate(spoken) if role in ("user", "developer")), default=-1)
        return cls(turns, spoken, last, thinking)

    def with_tools(self, tools) -> "Dialogue":
        """The same with `tools` on the first message."""
        first = self.turns[0]
        if first.get("tools"):
            raise UsageError("tools are given both on messages[0] and as an argument; give them once")
        return self._replace(turns=[{**first, "tools": tools}, *self.turns[1:]])

    def think(self, opens: bool) -> Mark:
        """What a turn of the model starts with."""
        return template.THINK if opens and self.thinking else template.THINK_END

    def drops(self, position: int) -> bool:
        """Whether the reference forgets the message when it forgets old reasoning, and then loses count."""
        kept = self.roles[position] in ROLES and self.roles[position] != "developer"
        return self.thinking and position < self.last and not kept

    def dropped(self, earlier: int) -> list[Fault]:
        """A fault for each message that is dropped; `earlier` messages come before the first that has an index."""
        faults = []
        for position in filter(self.drops, range(len(self.turns))):
            index = position - earlier if position >= earlier else None
            name = f"message {index}" if index is not None else f"context message {position}"
            role = self.roles[position]
            why = no_role(role) if role != "developer" else LATE_DEVELOPER
            faults.append(Fault("index_out_of_range", index, f"{name}: {why}"))
        return faults
