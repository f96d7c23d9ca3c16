"""From the model's text to an assistant message, accepting exactly what the reference parser accepts."""

import re
from collections.abc import Callable
from typing import Any

from ..errors import UsageError
from . import template
from .faults import ParsingError
from .messages import to_json

NAME = re.compile(r'\s*name="(.*?)">\n(?=\n?\Z)', re.DOTALL)
PARAMETER = re.compile(r' name="(.*?)" string="(true|false)">', re.DOTALL)
SEPARATOR = ">\n"


def parse(text: str, *, thinking: bool) -> dict[str, Any]:
    """The assistant message that a completion holds: role, content, reasoning_content, tool_calls (JSON arguments).

    `text` is what the model wrote after the prompt, decoded with special tokens and with the end-of-sentence token;
    `thinking` is what the prompt was encoded with. Nothing is trimmed. As in the reference, arguments that the model
    did not mark as a string are passed on as they are, JSON or not, and text that was cut off between two tags of a
    tool call is accepted with the calls so far: do not run calls from a completion that ended by length.
    Raises ParsingError. `parse_lenient` reads text with mistakes, and says which.
    """
    checked(text, thinking)
    return read(text, thinking, lambda key, value: value)


def read(text: str, thinking: bool, unmarked: Callable[[str, str], str]) -> dict[str, Any]:
    """What `parse` gives, where `unmarked` makes the JSON text of a parameter that is not marked as a string, of its
    name and its text."""
    cursor = Cursor(text, unmarked)
    reasoning, calls = "", []
    if thinking:
        reasoning, stop = cursor.read(template.THINK_END, template.READ_CALLS)
        if stop != template.THINK_END:
            raise cursor.error("invalid_thinking", f"the reasoning does not end with {template.THINK_END}")
    answer = cursor.position
    content, stop = cursor.read(template.EOS, template.READ_CALLS)
    if stop is None:
        raise cursor.error("invalid_summary", f"there is no {template.EOS} after the content")
    if stop == template.READ_CALLS:
        calls = _calls(cursor)
        if cursor.read(template.EOS)[0]:
            raise cursor.error("content_after_tool_calls", "text follows the tool calls")
    if not cursor.ended:
        raise cursor.error("content_at_end", f"text follows {template.EOS}")
    _screen(reasoning, 0)
    _screen(content, answer)
    return message(content, reasoning, calls)


def checked(text: str, thinking: bool) -> None:
    """Raises UsageError where the arguments are not a string and True or False."""
    if not isinstance(text, str):
        raise UsageError(f"the completion must be a string, not a {type(text).__name__}; decode token ids first")
    if type(thinking) is not bool:
        raise UsageError(f"thinking must be True (thinking) or False (chat), not {thinking!r}")


def message(content: str, reasoning: str, calls: list[tuple[str, str]]) -> dict[str, Any]:
    """An assistant message; `calls` are names and the JSON text of arguments."""
    functions = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning,
        "tool_calls": [{"type": "function", "function": function} for function in functions],
    }


def _screen(text: str, start: int) -> None:
    """Refuse special tokens in a text that begins at the character `start`."""
    for mark in template.SCREENED:
        if (at := text.find(mark)) >= 0:
            raise ParsingError("special_token_in_content", start + at, f"{mark} is not closed, or not opened")


class Cursor:
    """A text that is read from stop to stop; `unmarked` is that of `read`."""

    def __init__(self, text: str, unmarked: Callable[[str, str], str]):
        self.text = text
        self.unmarked = unmarked
        self.position = 0

    @property
    def ended(self) -> bool:
        return self.position >= len(self.text)

    def read(self, *stops: str) -> tuple[str, str | None]:
        """The text up to the first of `stops` and that stop; the rest and None where there is none."""
        start, end = self.position, len(self.text)
        found = re.compile("|".join(map(re.escape, stops))).search(self.text, start)
        self.position = found.end() if found else end
        return self.text[start : found.start() if found else end], found and found[0]

    def error(self, code: str, text: str) -> ParsingError:
        return ParsingError(code, self.position, text)


def _calls(cursor: Cursor) -> list[tuple[str, str]]:
    calls = []
    while not cursor.ended:
        between, stop = cursor.read(template.READ_INVOKE, template.READ_CALLS_END)
        if between != SEPARATOR:
            raise cursor.error("tool_call_format", "a tag of the tool calls is not followed by > and a line break")
        if stop == template.READ_CALLS_END:
            break
        if stop is None:
            raise cursor.error("missing_special_token", "the tool calls end without a tag")
        calls.append(_call(cursor))
    return calls


def _call(cursor: Cursor) -> tuple[str, str]:
    head, stop = cursor.read(template.READ_PARAMETER, template.READ_INVOKE_END)
    if not (name := NAME.match(head)):
        raise cursor.error("tool_name_format", 'a call does not begin with name="..."> and a line break')
    values: dict[str, str] = {}
    while stop == template.READ_PARAMETER:
        key, value = _parameter(cursor)
        if key in values:
            raise cursor.error("duplicate_parameter", f"the parameter {key!r} is given twice")
        values[key] = value
        between, stop = cursor.read(template.READ_PARAMETER, template.READ_INVOKE_END)
        if between != SEPARATOR:
            raise cursor.error("parameter_format", "a parameter is not followed by > and a line break")
    return name[1], as_arguments(values)


def _parameter(cursor: Cursor) -> tuple[str, str]:
    """The name of a parameter and the JSON text of its value."""
    body = cursor.read(template.READ_PARAMETER_END)[0].removesuffix("\n")
    head = PARAMETER.match(body)
    if head is None or not body.endswith("<"):
        raise cursor.error("parameter_format", 'a parameter is not name="..." string="true|false">...</')
    value = body[head.end() : -1]
    return head[1], to_json(value) if head[2] == "true" else cursor.unmarked(head[1], value)


def as_arguments(values: dict[str, str]) -> str:
    """The JSON text of an object whose values are JSON text already."""
    return "{" + ", ".join(f"{to_json(key)}: {value}" for key, value in values.items()) + "}"
