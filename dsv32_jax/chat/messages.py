"""Fields of one OpenAI-shaped message, validated, and the error for messages that have no encoding."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import UsageError, listing, pluralize
from ..system.files import reject_constant, reject_duplicates

Message = Mapping[str, Any]

JSON_TYPES = {
    **{dict: "an object", list: "a list", str: "a string", bool: "a boolean"},
    **{int: "a number", float: "a number", type(None): "null"},
}


FIELDS = {
    "system": ("content", "tools", "response_format"),
    "user": ("content",),
    "developer": ("content", "tools", "response_format"),
    "assistant": ("content", "reasoning_content", "tool_calls"),
    "tool": ("content", "tool_call_id", "name"),
}
"""The fields of a message of each role, beside the role."""

ALIASES = {"reasoning": "reasoning_content", "thinking": "reasoning_content"}
"""Names that clients give to fields."""

TOOL, CALL, FUNCTION = ("type", "function"), ("type", "function", "id", "index"), ("name", "arguments")


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
        self.code, self.index, _ = faults[0]
        lines = [fault.text for fault in faults[:limit]]
        if len(faults) > limit:
            lines.append(f"... and {len(faults) - limit} more")
        super().__init__(f"cannot encode the messages, {pluralize(len(faults), 'fault')}:\n  " + "\n  ".join(lines))


class InvalidMessage(Exception):
    """Aborts the encoding of one message: a code and a sentence. `encode` collects these into one EncodingError."""


def describe_type(value: Any) -> str:
    """Return the JSON type of `value` with its article, or the name of its Python type."""
    return JSON_TYPES.get(type(value), type(value).__name__)


def require_messages(messages: Any, name: str) -> list[Message]:
    """Return `messages` as a list. Raises UsageError unless it is a sequence, EncodingError unless of mappings."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        hint = "; use the tokenizer's encode to continue raw text" if isinstance(messages, str) else ""
        raise UsageError(f"{name} must be a list of messages, not {describe_type(messages)}{hint}")
    faults = [
        Fault("message_not_object", i if name == "messages" else None, f"{name}[{i}] is {describe_type(message)}")
        for i, message in enumerate(messages)
        if not isinstance(message, Mapping)
    ]
    if faults:
        raise EncodingError(faults)
    return list(messages)


def rename_aliases(message: Message) -> Message:
    """Return the message with the usual names of its fields, unless it has both; then `require_fields` refuses it."""
    renamed = {alias: name for alias, name in ALIASES.items() if message.get(alias) and not message.get(name)}
    return {renamed.get(key, key): value for key, value in message.items() if key not in renamed.values()}


def require_fields(value: Message, known: Sequence[str], place: str) -> None:
    """Raise InvalidMessage for fields that are not `known`, unless they say nothing: null, false, or empty."""
    same = [alias for alias, name in ALIASES.items() if name in known and value.get(alias) == value.get(name)]
    given = [key for key, content in value.items() if content not in (None, False, "", [], {}) and key not in same]
    if wrong := [repr(key) for key in given if key not in known]:
        rule = f"may have {', '.join(known)}"
        if "'prefix'" in wrong:
            rule += "; an answer that the model continues is not supported"
        raise InvalidMessage("unknown_key", f"unknown or misplaced: {listing(wrong)}; {place} {rule}")
    if value.get("type") not in (None, "function") and "type" in known:
        raise InvalidMessage("unknown_key", f"type of {place} must be 'function', not {value['type']!r:.60}")


def find_pending(messages: Sequence[Message]) -> list[str]:
    """Return the names of the functions that were called last and have no result yet."""
    given = len(list(itertools.takewhile(lambda message: message.get("role") == "tool", reversed(messages))))
    caller = messages[-1 - given] if given < len(messages) else {}
    calls = caller.get("tool_calls") if caller.get("role") == "assistant" else None
    return [call["function"]["name"] for call in calls or ()][given:]


def require_results(messages: Sequence[Message]) -> None:
    """Raise UsageError while the last tool calls have no results."""
    if pending := find_pending(messages):
        raise UsageError(f"add the results of pending tool calls first: {listing(pending)}")


def require_turn(messages: Sequence[Message]) -> None:
    """Raise UsageError unless it is the model's turn after these messages, which have an encoding."""
    require_results(messages)
    if not messages or messages[-1].get("role") not in ("user", "developer", "tool"):
        raise UsageError("it is not the model's turn: add a user's turn first")


def pair_results(turns: Sequence[Message]) -> tuple[list[Message], dict[int, str]]:
    """Return the messages with the results of tool calls in the order of the calls, where ids tell it; and by index
    what is wrong with results that contradict their calls."""
    paired, wrong = list(turns), {}
    for first, turn in enumerate(turns, 1):
        calls = turn.get("tool_calls") if turn.get("role") == "assistant" else None
        if not isinstance(calls, list | tuple) or not all(isinstance(call, Mapping) for call in calls):
            continue
        results = list(itertools.takewhile(lambda turn: turn.get("role") == "tool", turns[first:]))
        ids, places = [call.get("id") for call in calls], {}
        for i, result in enumerate(results):
            given, place = result.get("tool_call_id"), i
            if given is not None and any(ids):
                place = ids.index(given) if given in ids else -1
            function = calls[place].get("function") if 0 <= place < len(calls) else None
            name = function.get("name") if isinstance(function, Mapping) else None
            if place < 0 or place in places:
                whose = "another result of a" if place >= 0 else "no"
                wrong[first + i] = f"tool_call_id {given!r:.60} is that of {whose} call"
            elif result.get("name") and name not in (None, result["name"]):
                wrong[first + i] = f"it is a result of {result['name']!r:.60}, but its call is to {name!r:.60}"
            places[place] = result
        if len(places) == len(results) and sorted(places) != list(range(len(results))):
            wrong.setdefault(first, "results of calls before it are missing")
        elif len(places) == len(results):
            paired[first : first + len(results)] = [places[place] for place in sorted(places)]
    return paired, wrong


def get_text(message: Message, field: str, default: str | None = None) -> str:
    """Return the text of a field. `default` replaces an empty or missing one; without it numbers and None are written
    as Python writes them."""
    value = message.get(field)
    if default is not None and not value:
        return default
    if isinstance(value, str):
        return value
    if value is not None and not isinstance(value, int | float):
        text = f"{field} must be a string, not {describe_type(value)}; join the parts of a list first"
        raise InvalidMessage("content_not_text", text)
    try:
        return str(value)
    except ValueError as error:
        raise InvalidMessage("content_not_text", f"{field} must be a string: {error}") from None


def require_sayable(pieces: list[str]) -> list[str]:
    """Return the pieces of a message. Raises InvalidMessage for half a surrogate pair, which no tokens can say."""
    try:
        "".join(pieces).encode()
    except UnicodeEncodeError as error:
        text = f"a lone surrogate, {error.object[error.start]!r}, which no tokens can say"
        raise InvalidMessage("content_not_text", text) from None
    return pieces


def get_schemas(message: Message) -> list[str]:
    """Return the JSON of each tool's function."""
    schemas = []
    for i, tool in enumerate(_get_list(message, "tools")):
        if not isinstance(tool, Mapping) or "function" not in tool:
            raise InvalidMessage("missing_key", f"tools[{i}] must be an object with the schema under 'function'")
        require_fields(tool, TOOL, f"tools[{i}]")
        schemas.append(to_json(tool["function"]))
    return schemas


def get_calls(message: Message) -> list[tuple[str, dict[str, Any]]]:
    """Return the name and arguments of each tool call of an assistant message."""
    calls = []
    for i, call in enumerate(_get_list(message, "tool_calls")):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise InvalidMessage("missing_key", f"tool_calls[{i}] must be an object with a 'function'")
        require_fields(call, CALL, f"tool_calls[{i}]")
        require_fields(function, FUNCTION, f"tool_calls[{i}].function")
        if missing := [key for key in ("name", "arguments") if key not in function]:
            raise InvalidMessage("missing_key", f"tool_calls[{i}].function has no {' and no '.join(missing)}")
        name, text = function["name"], function["arguments"]
        if not isinstance(name, str):
            raise InvalidMessage("name_not_string", f"tool_calls[{i}].function.name is {describe_type(name)}")
        calls.append((name, _parse_arguments(text, f"the arguments of the call to {name[:40]!r}")))
    return calls


def _parse_arguments(text: Any, subject: str) -> dict[str, Any]:
    if not isinstance(text, str):
        reason = f"{subject} must be JSON text, not {describe_type(text)}; use json.dumps"
        raise InvalidMessage("arguments_not_string", reason)
    try:
        arguments = load_json(text)
    except ValueError as error:
        raise InvalidMessage("arguments_not_json", f"{subject} are not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise InvalidMessage("arguments_not_object", f"{subject} must be a JSON object, not {describe_type(arguments)}")
    return arguments


def load_json(text: str) -> Any:
    """Return the value of a JSON text. Raises ValueError, also for what could not be said again as it is: NaN, numbers
    beyond all floats, doubled keys, half a surrogate pair."""
    try:
        value = json.loads(text, object_pairs_hook=reject_duplicates, parse_constant=reject_constant)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError as error:
        raise ValueError(str(error)) from None
    return value


def is_json(text: str) -> bool:
    """Return whether a text is JSON that `load_json` takes."""
    try:
        load_json(text)
    except ValueError:
        return False
    return True


def to_json(value: Any) -> str:
    """Return JSON as the format writes it: spaces after separators, non-ASCII as it is, NaN and Infinity by name."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidMessage("not_json", f"a value has no JSON form: {error}") from None


def build_message(content: str, reasoning: str, calls: list[tuple[str, str]]) -> dict[str, Any]:
    """Return an assistant message; `calls` are pairs of a name and the JSON text of its arguments."""
    functions = [{"name": name, "arguments": arguments} for name, arguments in calls]
    tool_calls = [{"type": "function", "function": function} for function in functions]
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": tool_calls}


def join_arguments(values: dict[str, str]) -> str:
    """Return the JSON text of an object whose values are JSON text already."""
    return "{" + ", ".join(f"{to_json(key)}: {value}" for key, value in values.items()) + "}"


def _get_list(message: Message, field: str) -> Sequence:
    value = message.get(field) or []
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise InvalidMessage("not_a_list", f"{field} must be a list, not {describe_type(value)}")
    return value
