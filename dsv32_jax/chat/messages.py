"""The fields of one message, read with care: what is not there or is something else has a name."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .faults import Malformed

Message = Mapping[str, Any]

KINDS = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}


def kind(value: Any) -> str:
    """What `value` is, in JSON's words where it has one."""
    return "null" if value is None else KINDS.get(type(value), type(value).__name__)


def text(message: Message, field: str, none: str | None = None) -> str:
    """The text of a field. `none`: what stands for an empty or missing one; without it Python's word for it does."""
    value = message.get(field)
    if none is not None and not value:
        return none
    if isinstance(value, str):
        return value
    if value is not None and not isinstance(value, int | float):
        raise Malformed(
            "content_not_text", f"{field} must be a string, not a {kind(value)}; join the parts of a list yourself"
        )
    try:
        return str(value)
    except ValueError as error:
        raise Malformed("content_not_text", f"{field} must be a string: {error}") from None


def schemas(message: Message) -> list[str]:
    """The JSON of each tool's function, as it was given."""
    tools = message.get("tools")
    if not tools:
        return []
    found = []
    for i, tool in enumerate(_list(tools, "tools")):
        if not isinstance(tool, Mapping) or "function" not in tool:
            raise Malformed("missing_key", f"tools[{i}] must be an object with the schema under 'function'")
        found.append(to_json(tool["function"]))
    return found


def call_count(message: Message) -> int:
    """How many calls an assistant message makes, good or bad ones."""
    found = message.get("tool_calls")
    return len(found) if isinstance(found, list | tuple) else 0


def calls(message: Message) -> list[Mapping]:
    """The functions that an assistant message calls."""
    found = []
    for i, call in enumerate(_list(message.get("tool_calls") or [], "tool_calls")):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise Malformed("missing_key", f"tool_calls[{i}] must be an object with a 'function'")
        if missing := [key for key in ("name", "arguments") if key not in function]:
            raise Malformed("missing_key", f"tool_calls[{i}].function has no {' and no '.join(missing)}")
        if not isinstance(function["name"], str):
            raise Malformed("name_not_string", f"tool_calls[{i}].function.name is a {kind(function['name'])}")
        found.append(function)
    return found


def arguments(function: Mapping) -> dict[str, Any]:
    """The arguments of a call, which are the JSON text of an object."""
    given, where = function["arguments"], f"the arguments of the call to {function['name'][:40]!r}"
    if not isinstance(given, str):
        raise Malformed("arguments_not_string", f"{where} must be JSON text, not a {kind(given)}; use json.dumps")
    try:
        value = json.loads(given)
    except (ValueError, RecursionError) as error:
        raise Malformed("arguments_not_json", f"{where} are not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Malformed("arguments_not_object", f"{where} must be a JSON object, not a {kind(value)}")
    return value


def to_json(value: Any) -> str:
    """JSON as the format writes it: separators with spaces, every character as it is, NaN and Infinity by name."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise Malformed("not_json", f"a value has no JSON: {error}") from None


def _list(value: Any, name: str) -> Sequence:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise Malformed("not_a_list", f"{name} must be a list, not a {kind(value)}")
    return value
