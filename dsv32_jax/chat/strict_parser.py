"""Parse a completion into an assistant message, accepting exactly what the reference parser accepts."""

import re
from collections.abc import Callable
from typing import Any

from ..errors import DsvError, UsageError
from . import template
from .messages import to_json
from .tool_calls import build_message, join_arguments

NAME = re.compile(r'\s*name="(.*?)">\n(?=\n?\Z)', re.DOTALL)
PARAMETER = re.compile(r' name="(.*?)" string="(true|false)">', re.DOTALL)
SEPARATOR = ">\n"


class ParsingError(DsvError, ValueError):
    """A completion that violates the message format: `code` names the rule, `position` the character."""

    exit_code = 3

    def __init__(self, code: str, position: int, text: str):
        super().__init__(
            f"the completion violates the message format at character {position}: {text}; "
            "parse_lenient recovers what it can"
        )
        self.code = code
        self.position = position


def parse(text: str, *, thinking: bool) -> dict[str, Any]:
    """Return the assistant message in a completion: role, content, reasoning_content, tool_calls (JSON arguments).

    `text` is what the model wrote after the prompt, decoded with special tokens, end-of-sentence token included;
    `thinking` is what the prompt was encoded with. Nothing is trimmed. As in the reference, arguments that are not
    marked as strings are passed through, JSON or not, and text cut off between two tags of a tool call is accepted with
    the calls so far: do not run calls of a completion that ended by length. Raises ParsingError.
    """
    require_completion(text, thinking)
    return parse_strictly(text, thinking, lambda key, value: value)


def parse_strictly(text: str, thinking: bool, to_value: Callable[[str, str], str]) -> dict[str, Any]:
    """Implement `parse`; `to_value(name, text)` returns the JSON text of a parameter that is not marked as a string."""
    cursor = _Cursor(text, to_value)
    reasoning, calls = "", []
    if thinking:
        reasoning, stop = cursor.read_to(template.THINK_END, template.READ_CALLS)
        if stop != template.THINK_END:
            raise cursor.error("invalid_thinking", f"the reasoning does not end with {template.THINK_END}")
    start = cursor.position
    content, stop = cursor.read_to(template.EOS, template.READ_CALLS)
    if stop is None:
        raise cursor.error("invalid_summary", f"the content does not end with {template.EOS}")
    if stop == template.READ_CALLS:
        calls = _parse_calls(cursor)
        if cursor.read_to(template.EOS)[0]:
            raise cursor.error("content_after_tool_calls", "text follows the tool calls")
    if cursor.position < len(text):
        raise cursor.error("content_at_end", f"text follows {template.EOS}")
    for part, offset in ((reasoning, 0), (content, start)):
        for mark in template.SCREENED:
            if (at := part.find(mark)) >= 0:
                raise ParsingError("special_token_in_content", offset + at, f"unmatched {mark}")
    return build_message(content, reasoning, calls)


def require_completion(text: str, thinking: bool) -> None:
    if not isinstance(text, str):
        raise UsageError(f"the completion must be a string, not a {type(text).__name__}; decode token ids first")
    if re.search("[\ud800-\udfff]", text):
        raise UsageError("the completion has half a surrogate pair, which UTF-8 cannot encode; decode token ids")
    if type(thinking) is not bool:
        raise UsageError(f"thinking must be True (thinking) or False (chat), not {thinking!r}")


class _Cursor:
    """A position in the text, advanced from stop string to stop string."""

    def __init__(self, text: str, to_value: Callable[[str, str], str]):
        self.text, self.to_value, self.position = text, to_value, 0

    def read_to(self, *stops: str) -> tuple[str, str | None]:
        """Return the text up to the first of `stops`, and that stop; the rest and None where there is none."""
        start, end = self.position, len(self.text)
        match = re.compile("|".join(map(re.escape, stops))).search(self.text, start)
        self.position = match.end() if match else end
        return self.text[start : match.start() if match else end], match and match[0]

    def error(self, code: str, text: str) -> ParsingError:
        return ParsingError(code, self.position, text)


def _parse_calls(cursor: _Cursor) -> list[tuple[str, str]]:
    calls = []
    while cursor.position < len(cursor.text):
        between, stop = cursor.read_to(template.READ_INVOKE, template.READ_CALLS_END)
        if between != SEPARATOR:
            raise cursor.error("tool_call_format", "expected > and a line break after a tag of the tool calls")
        if stop == template.READ_CALLS_END:
            break
        if stop is None:
            raise cursor.error("missing_special_token", "the tool calls are not closed")
        calls.append(_parse_call(cursor))
    return calls


def _parse_call(cursor: _Cursor) -> tuple[str, str]:
    head, stop = cursor.read_to(template.READ_PARAMETER, template.READ_INVOKE_END)
    if not (name := NAME.match(head)):
        raise cursor.error("tool_name_format", 'a call must begin with name="..."> and a line break')
    values: dict[str, str] = {}
    while stop == template.READ_PARAMETER:
        body = cursor.read_to(template.READ_PARAMETER_END)[0].removesuffix("\n")
        parameter = PARAMETER.match(body)
        if parameter is None or not body.endswith("<"):
            raise cursor.error("parameter_format", 'a parameter must be name="..." string="true|false">...</')
        (key, is_string), value = parameter.groups(), body[parameter.end() : -1]
        if key in values:
            raise cursor.error("duplicate_parameter", f"parameter {key!r} appears twice")
        values[key] = to_json(value) if is_string == "true" else cursor.to_value(key, value)
        between, stop = cursor.read_to(template.READ_PARAMETER, template.READ_INVOKE_END)
        if between != SEPARATOR:
            raise cursor.error("parameter_format", "expected > and a line break after a parameter")
    return name[1], join_arguments(values)
