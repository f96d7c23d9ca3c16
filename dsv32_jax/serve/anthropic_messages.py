"""Anthropic's /v1/messages: its requests in OpenAI's fields, and answers in its blocks."""

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from ..chat import Tokenizer
from ..chat.messages import is_json, to_json
from ..chat.streaming_parser import ARGUMENTS, CALL, CONTENT, REASONING, Piece
from . import fields
from .api_error import ApiError
from .choice import Call, Choice
from .driver import Arrival, Job
from .fields import get, require
from .openai_objects import count_usage
from .reading import Ask, Reader

SAME = ("model", "stream", "temperature", "top_p", "top_k")
COUNTED = {"model", "messages", "system", "tools", "tool_choice", "thinking"}
KNOWN = COUNTED | {*SAME, "max_tokens", "stop_sequences", "metadata"}
BLOCKS = {"text", "tool_use", "tool_result", "thinking"}
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def read_messages(reader: Reader, body: Mapping[str, Any]) -> Ask:
    """Return what a body of /v1/messages asks for. Raises ApiError and UsageError."""
    fields.require_known(body, KNOWN, needs=("messages",))
    given = {"max_tokens": require(body, "max_tokens", int), "stop": get(body, "stop_sequences", list)}
    return reader.read_chat({**_translate(body), **{name: body.get(name) for name in SAME}, **given})


def count_tokens(reader: Reader, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return how many tokens the prompt of such a body has. Raises ApiError and UsageError."""
    fields.require_known(body, COUNTED, needs=("messages",))
    return {"input_tokens": reader.tokenize(_translate(body))["count"]}


def _translate(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return messages, tools and thinking in OpenAI's fields."""
    system = fields.join_parts(body.get("system"), "system")
    messages = [{"role": "system", "content": system}] if system else []
    for i, message in enumerate(require(body, "messages", list)):
        messages += _translate_message(message, f"messages[{i}]")
    found: dict[str, Any] = {
        "messages": messages,
        "tools": [_translate_tool(one) for one in get(body, "tools", list, [])],
    }
    if (choice := get(body, "tool_choice", dict)) is not None:
        fields.require_known(choice, {"type", "name", "disable_parallel_tool_use"}, "tool_choice")
        kind = require(choice, "type", str)
        named = {"type": "function", "function": {"name": choice.get("name")}}
        found["tool_choice"] = named if kind == "tool" else CHOICES.get(kind, kind)
        found["parallel_tool_calls"] = not get(choice, "disable_parallel_tool_use", bool, False)
    if (thinking := get(body, "thinking", dict)) is not None:
        fields.require_known(thinking, {"type", "budget_tokens"}, "thinking")
        found["thinking"] = {"type": "enabled" if thinking.get("type") == "adaptive" else thinking.get("type")}
    return found


def _translate_tool(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") not in (None, "custom"):
        raise ApiError(400, f"tools may be those of the client, of type 'custom', not {tool!r:.100}", param="tools")
    fields.require_known(tool, {"type", "name", "description", "input_schema", "strict", "cache_control"}, "a tool")
    function = {"name": tool.get("name"), "description": tool.get("description"), "strict": tool.get("strict")}
    function["parameters"] = tool.get("input_schema")
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _translate_message(message: Any, place: str) -> list[dict[str, Any]]:
    """Return one message as OpenAI's, the results of tools before the text of a user."""
    if not isinstance(message, dict) or message.get("role") not in ("user", "assistant"):
        raise ApiError(400, f"{place} must be an object with the role 'user' or 'assistant'", param="messages")
    role, content = message["role"], message.get("content")
    if not isinstance(content, list):
        return [{"role": role, "content": content}]
    blocks = [block if isinstance(block, dict) else {} for block in content]
    if wrong := [block for block in blocks if block.get("type") not in BLOCKS]:
        text = f"{place} may hold blocks of the types {', '.join(sorted(BLOCKS))}, not {wrong[0]!r:.100}"
        raise ApiError(400, text, param="messages")
    texts = "\n".join(require(block, "text", str) for block in blocks if block["type"] == "text")
    if role == "user":
        results = [
            {
                "role": "tool",
                "tool_call_id": require(block, "tool_use_id", str),
                "content": fields.join_parts(block.get("content"), place) or "",
            }
            for block in blocks
            if block["type"] == "tool_result"
        ]
        return results + ([{"role": role, "content": texts}] if texts or not results else [])
    thoughts = "\n".join(require(block, "thinking", str) for block in blocks if block["type"] == "thinking")
    calls = [
        {
            "id": require(block, "id", str),
            "type": "function",
            "function": {"name": require(block, "name", str), "arguments": to_json(require(block, "input", dict))},
        }
        for block in blocks
        if block["type"] == "tool_use"
    ]
    return [{"role": role, "content": texts, "reasoning_content": thoughts, "tool_calls": calls}]


class MessagesWriter:
    """Writes the answer to one request, whole or as events."""

    def __init__(self, ask: Ask, tokenizer: Tokenizer):
        self.ask, self._open, self._count = ask, "", 0
        head = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "model": ask.model}
        self._head = {**head, "content": [], "stop_reason": None, "stop_sequence": None}

    def write_whole(self, choices: Sequence[Choice], job: Job) -> dict[str, Any]:
        """Return the whole answer. A call that is cut off is left out, because its input is no object."""
        (choice,) = choices
        text = [
            (_write_block(part), name, choice.text[part]) for part, name in ((REASONING, "thinking"), (CONTENT, "text"))
        ]
        blocks = [{**block, name: said} for block, name, said in text if said]
        blocks += [
            {**_write_block(CALL, call), "input": json.loads(call.arguments)}
            for call in choice.calls
            if is_json(call.arguments)
        ]
        warnings = {"parse_warnings": choice.warnings} if choice.warnings else {}
        return {**self._head, "content": blocks, **_write_end(choice, job), "usage": _write_usage(job), **warnings}

    def open(self, choices: Sequence[Choice], job: Job) -> str:
        """Return the first event."""
        return _write_event("message_start", message={**self._head, "usage": _write_usage(job)})

    def add(self, choice: Choice, arrival: Arrival, pieces: Sequence[Piece]) -> str:
        """Return the events for what came: a block ends where another one begins."""
        events, index = "", len(choice.calls) - sum(piece.part == CALL for piece in pieces) - 1
        for part, text in pieces:
            if part == CALL:
                index += 1
            if part == CALL or (part != ARGUMENTS and part != self._open):
                events += self._close() + self._start(part, choice.calls[index] if part == CALL else None)
            if part != CALL:
                kind, name = {
                    REASONING: ("thinking_delta", "thinking"),
                    CONTENT: ("text_delta", "text"),
                    ARGUMENTS: ("input_json_delta", "partial_json"),
                }[part]
                events += _write_event("content_block_delta", index=self._count, delta={"type": kind, name: text})
        return events

    def close(self, choices: Sequence[Choice], job: Job) -> str:
        """Return the last events."""
        end = _write_event("message_delta", delta=_write_end(choices[0], job), usage=_write_usage(job))
        return self._close() + end + _write_event("message_stop")

    def fail(self, error: ApiError) -> str:
        """Return the event of an error that ends the stream."""
        return f"event: error\ndata: {json.dumps(error.to_anthropic())}\n\n"

    def _start(self, part: str, call: Call | None) -> str:
        self._open = part
        return _write_event("content_block_start", index=self._count, content_block=_write_block(part, call))

    def _close(self) -> str:
        if not self._open:
            return ""
        index, self._open, self._count = self._count, "", self._count + 1
        return _write_event("content_block_stop", index=index)


def _write_block(part: str, call: Call | None = None) -> dict[str, Any]:
    """Return an empty block."""
    if call is not None:
        return {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
    return {"type": "text", "text": ""} if part == CONTENT else {"type": "thinking", "thinking": "", "signature": ""}


def _write_end(choice: Choice, job: Job) -> dict[str, Any]:
    hit = job.rows[choice.index].stop_string
    reason = "stop_sequence" if hit is not None else REASONS[str(choice.finish_reason)]
    return {"stop_reason": reason, "stop_sequence": hit}


def _write_usage(job: Job) -> dict[str, int]:
    usage = count_usage(job)
    cached = usage["prompt_tokens_details"]["cached_tokens"] if job.rows[0].tokens else 0
    new = {"output_tokens": usage["completion_tokens"], "cache_creation_input_tokens": 0}
    return {"input_tokens": usage["prompt_tokens"] - cached, "cache_read_input_tokens": cached, **new}


def _write_event(kind: str, **content: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **content})}\n\n"
