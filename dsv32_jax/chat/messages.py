"""Fields of one OpenAI-shaped message, validated, and the error for messages that have no encoding."""

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


def require_content(messages: Sequence[Any]) -> None:
    """Raise UsageError for a client's messages without content: for that of a user or a tool, the reference's encoder,
    and so `encode`, writes the word None."""
    fields = ("content", "reasoning_content", *ALIASES, "tool_calls")
    empty = [
        f"message {i} ({message.get('role'):.40})"
        for i, message in enumerate(messages)
        if isinstance(message, Mapping)
        and message.get("role") in ("user", "tool", "assistant")
        and all(message.get(name) is None for name in (fields if message["role"] == "assistant" else fields[:1]))
    ]
    if empty:
        raise UsageError(f"content is missing in {pluralize(len(empty), 'message')}: {listing(empty)}")


def rename_aliases(message: Message) -> Message:
    """Return the message with the usual names of its fields, unless it has both; then `require_fields` refuses it."""
    renamed = {alias: name for alias, name in ALIASES.items() if message.get(alias) and not message.get(name)}
    return {renamed.get(key, key): value for key, value in message.items() if key not in renamed.values()}


def require_fields(value: Message, known: Sequence[str], place: str) -> None:
    """Raise InvalidMessage for fields that are not `known`, unless they are null, false or empty."""
    same = [alias for alias, name in ALIASES.items() if name in known and value.get(alias) == value.get(name)]
    given = [key for key, content in value.items() if content not in (None, False, "", [], {}) and key not in same]
    if wrong := [repr(key) for key in given if key not in known]:
        rule = f"may have {', '.join(known)}"
        if "'prefix'" in wrong:
            rule += "; an answer that the model continues is not supported"
        raise InvalidMessage("unknown_key", f"unknown or misplaced: {listing(wrong)}; {place} {rule}")
    if value.get("type") not in (None, "function") and "type" in known:
        raise InvalidMessage("unknown_key", f"type of {place} must be 'function', not {value['type']!r:.60}")


def get_text(message: Message, field: str, default: str | None = None) -> str:
    """Return the text of a field, `default` for an empty one; without it numbers and None are written as in Python."""
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


def require_encodable(pieces: list[str]) -> list[str]:
    """Return the pieces of a message. Raises InvalidMessage for half a surrogate pair, which UTF-8 cannot encode."""
    try:
        "".join(pieces).encode()
    except UnicodeEncodeError as error:
        text = f"a lone surrogate, {error.object[error.start]!r}, which UTF-8 cannot encode"
        raise InvalidMessage("content_not_text", text) from None
    return pieces


def get_schemas(message: Message) -> list[str]:
    """Return the JSON of each tool's function."""
    schemas = []
    for i, tool in enumerate(get_list(message, "tools")):
        if not isinstance(tool, Mapping) or "function" not in tool:
            raise InvalidMessage("missing_key", f"tools[{i}] must be an object with the schema under 'function'")
        require_fields(tool, ("type", "function"), f"tools[{i}]")
        schemas.append(to_json(tool["function"]))
    return schemas


def load_json(text: str) -> Any:
    """Return the value of a JSON text. Raises ValueError, also for what cannot be written back unchanged: NaN, numbers
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


def get_list(message: Message, field: str) -> Sequence:
    """Return the list in a field, empty if there is none. Raises InvalidMessage for anything else."""
    value = message.get(field) or []
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise InvalidMessage("not_a_list", f"{field} must be a list, not {describe_type(value)}")
    return value
