"""Tool calls of messages and their results: which are pending, which belong together, and their JSON."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UsageError, listing
from .messages import InvalidMessage, Message, describe_type, get_list, load_json, require_fields, to_json


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
    """Return the messages with the results of tool calls in the order of the calls, where their ids give it, and what
    is wrong, by index, with results that contradict their calls."""
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


def get_calls(message: Message) -> list[tuple[str, dict[str, Any]]]:
    """Return the name and arguments of each tool call of an assistant message."""
    calls = []
    for i, call in enumerate(get_list(message, "tool_calls")):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise InvalidMessage("missing_key", f"tool_calls[{i}] must be an object with a 'function'")
        require_fields(call, ("type", "function", "id", "index"), f"tool_calls[{i}]")
        require_fields(function, ("name", "arguments"), f"tool_calls[{i}].function")
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


def build_message(content: str, reasoning: str, calls: list[tuple[str, str]]) -> dict[str, Any]:
    """Return an assistant message; `calls` are pairs of a name and the JSON text of its arguments."""
    functions = [{"name": name, "arguments": arguments} for name, arguments in calls]
    tool_calls = [{"type": "function", "function": function} for function in functions]
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": tool_calls}


def join_arguments(values: dict[str, str]) -> str:
    """Return the JSON text of an object whose values are JSON text already."""
    return "{" + ", ".join(f"{to_json(key)}: {value}" for key, value in values.items()) + "}"
