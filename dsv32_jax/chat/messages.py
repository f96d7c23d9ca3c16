"""Fields of one OpenAI-shaped message, validated, and the error for messages that have no encoding."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import UsageError

Message = Mapping[str, Any]

JSON_TYPES = {
    **{dict: "an object", list: "a list", str: "a string", bool: "a boolean"},
    **{int: "a number", float: "a number", type(None): "null"},
}


class Fault(NamedTuple):
    """One fault: a `code` for programs, the `index` of the message (None without one), and a sentence."""

    code: str
    index: int | None
    text: str


class EncodingError(UsageError):
    """Messages that have no encoding.

    `faults` holds the first fault of each bad message; `code` and `index` are those of the first of them. An index
    counts in the list that was passed and is None where no single message of it is at fault.
    """

    def __init__(self, faults: list[Fault], limit: int = 20):
        self.faults = tuple(faults)
        self.code, self.index, first = faults[0]
        if len(faults) == 1:
            super().__init__(f"cannot encode the messages: {first}")
            return
        lines = "".join(f"\n  {fault.text}" for fault in faults[:limit])
        more = f"\n  ... and {len(faults) - limit} more" if len(faults) > limit else ""
        super().__init__(f"cannot encode the messages ({len(faults)} faults):{lines}{more}")


class InvalidMessage(Exception):
    """Abort the encoding of one message; `encode` collects these into one EncodingError."""

    def __init__(self, code: str, text: str):
        super().__init__(text)
        self.code = code


def describe_type(value: Any) -> str:
    """Return the JSON type of `value` with its article, or the name of its Python type."""
    return JSON_TYPES.get(type(value), type(value).__name__)


def require_messages(messages: Any, name: str) -> list[Message]:
    """Return `messages` as a list. Raises UsageError unless it is a sequence, EncodingError unless of mappings."""
    if isinstance(messages, str):
        raise UsageError(
            f"{name} must be a list of messages, not a string: pass [{{'role': 'user', 'content': ...}}] to chat, or "
            "use the tokenizer's encode to continue raw text"
        )
    if not isinstance(messages, Sequence) or isinstance(messages, bytes):
        raise UsageError(f"{name} must be a list of messages, not {describe_type(messages)}")
    faults = [
        Fault("message_not_object", i if name == "messages" else None, f"{name}[{i}] is {describe_type(message)}")
        for i, message in enumerate(messages)
        if not isinstance(message, Mapping)
    ]
    if faults:
        raise EncodingError(faults)
    return list(messages)


def get_text(message: Message, field: str, default: str | None = None) -> str:
    """Return the text of a field. `default` replaces an empty or missing one; without it numbers and None are written
    as Python writes them."""
    value = message.get(field)
    if default is not None and not value:
        return default
    if isinstance(value, str):
        return value
    if value is not None and not isinstance(value, int | float):
        raise InvalidMessage(
            "content_not_text", f"{field} must be a string, not {describe_type(value)}; join the parts of a list first"
        )
    try:
        return str(value)
    except ValueError as error:
        raise InvalidMessage("content_not_text", f"{field} must be a string: {error}") from None


def get_schemas(message: Message) -> list[str]:
    """Return the JSON of each tool's function."""
    schemas = []
    for i, tool in enumerate(_require_list(message.get("tools") or [], "tools")):
        if not isinstance(tool, Mapping) or "function" not in tool:
            raise InvalidMessage("missing_key", f"tools[{i}] must be an object with the schema under 'function'")
        schemas.append(to_json(tool["function"]))
    return schemas


def get_calls(message: Message) -> list[tuple[str, dict[str, Any]]]:
    """Return the name and arguments of each tool call of an assistant message."""
    calls = []
    for i, call in enumerate(_require_list(message.get("tool_calls") or [], "tool_calls")):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise InvalidMessage("missing_key", f"tool_calls[{i}] must be an object with a 'function'")
        if missing := [key for key in ("name", "arguments") if key not in function]:
            raise InvalidMessage("missing_key", f"tool_calls[{i}].function has no {' and no '.join(missing)}")
        if not isinstance(function["name"], str):
            raise InvalidMessage(
                "name_not_string", f"tool_calls[{i}].function.name is {describe_type(function['name'])}"
            )
        calls.append((function["name"], _parse_arguments(function)))
    return calls


def _parse_arguments(function: Mapping) -> dict[str, Any]:
    text, subject = function["arguments"], f"the arguments of the call to {function['name'][:40]!r}"
    if not isinstance(text, str):
        raise InvalidMessage(
            "arguments_not_string", f"{subject} must be JSON text, not {describe_type(text)}; use json.dumps"
        )
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidMessage("arguments_not_json", f"{subject} are not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise InvalidMessage("arguments_not_object", f"{subject} must be a JSON object, not {describe_type(arguments)}")
    return arguments


def to_json(value: Any) -> str:
    """Return JSON as the format writes it: spaces after separators, non-ASCII as it is, NaN and Infinity by name."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidMessage("not_json", f"a value has no JSON form: {error}") from None


def _require_list(value: Any, name: str) -> Sequence:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise InvalidMessage("not_a_list", f"{name} must be a list, not {describe_type(value)}")
    return value
