"""Encode messages as a prompt, byte for byte as the reference encoder of DeepSeek-V3.2 does."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UsageError, pluralize
from . import template
from .messages import (
    FIELDS,
    EncodingError,
    Fault,
    InvalidMessage,
    Message,
    get_schemas,
    get_text,
    rename_aliases,
    require_encodable,
    require_fields,
    require_messages,
    to_json,
)
from .template import Mark
from .tool_calls import get_calls, pair_results

ROLES = tuple(FIELDS)

UNKNOWN_ROLE = f"unknown role {{!r}}; the roles are {', '.join(ROLES)}"
MISPLACED_DEVELOPER = (
    "a thinking prompt cannot hold a developer message before a later user or developer message; "
    "pass drop_thinking=False, or use chat mode"
)


def encode(
    messages: Sequence[Message],
    *,
    thinking: bool,
    tools: Sequence[Mapping] | None = None,
    context: Sequence[Message] = (),
    drop_thinking: bool = True,
    bos: bool = True,
) -> str:
    """Return the prompt of OpenAI-shaped `messages`, up to where the model continues.

    role       fields read
    system     content, tools, response_format
    user       content
    developer  content, tools, response_format
    assistant  content, reasoning_content, tool_calls (`arguments` is the JSON text of an object)
    tool       content, tool_call_id, name; results without ids belong to the preceding calls in order

    The tool calls of an assistant message are not written where its content is `Sampled`, which holds them already.
    Other fields are refused, unless they are null, false or empty. `reasoning` and `thinking` are other names
    of reasoning_content.

    `thinking`       whether the model thinks before it answers. Reasoning is written only after the last user or
                     developer message, and never in chat mode.
    `tools`          schemas for the first message if it is a system or developer message, else written before it.
    `context`        earlier messages: they count but are not written, nor is the beginning-of-sentence token.
    `drop_thinking`  False allows a developer message before a later user turn, which the format otherwise cannot hold.
    `bos`            False omits the beginning-of-sentence token.

    As in the reference, content is not escaped, so a string that looks like a special token becomes one when the
    prompt is tokenized as a whole; `prepare` returns token ids that content cannot forge. User or tool content that is
    None or a number is written as Python writes it; a list or an object is refused. Raises EncodingError, which lists
    every bad message.
    """
    return "".join(
        encode_pieces(messages, thinking=thinking, tools=tools, context=context, drop_thinking=drop_thinking, bos=bos)
    )


def encode_pieces(messages, *, thinking, tools=None, context=(), drop_thinking=True, bos=True) -> list[str]:
    """Return the pieces that `encode` joins: Marks for the format's own text, plain strings for messages' content."""
    if type(thinking) is not bool:
        text = f"thinking must be True (thinking) or False (chat), not {thinking!r}"
        raise EncodingError([Fault("invalid_thinking_mode", None, text)])
    new, earlier = require_messages(messages, "messages"), require_messages(context, "context")
    turns, first = earlier + new, len(earlier)
    if tools and turns and turns[0].get("role") in ("system", "developer"):
        if turns[0].get("tools"):
            raise UsageError("tools are passed both on messages[0] and as an argument; pass them once")
        turns[0] = {**turns[0], "tools": tools}
    elif tools and not earlier:
        turns, first = [{"role": "system", "tools": tools}, *turns], 1
    encoder = _Encoder(turns, thinking)
    pieces: list[str] = [template.BOS] if bos and not earlier else []
    faults: list[Fault] = []
    for position in range(len(earlier), len(turns)):
        if drop_thinking and encoder.drops(position):
            continue
        try:
            pieces += require_encodable(encoder.encode(position))
        except InvalidMessage as error:
            index = position - first if position >= first else None
            name = "tools" if index is None else f"message {index} ({encoder.roles[position]:.40})"
            code, text = error.args
            faults.append(Fault(code, index, f"{name}: {text}"))
    if drop_thinking and new:
        faults += [encoder.describe_drop(i, first) for i in range(len(turns)) if encoder.drops(i)]
    if faults:
        raise EncodingError(faults)
    return pieces


class _Encoder:
    """Context and messages in one list, their roles, the index of the last user or developer turn (or -1), the mode."""

    def __init__(self, turns: list[Message], thinking: bool):
        paired, self.contradictions = pair_results(turns)
        self.turns, self.thinking = [rename_aliases(turn) for turn in paired], thinking
        self.roles = [role if isinstance(role := turn.get("role"), str) else repr(role) for turn in turns]
        self.last = max((i for i, role in enumerate(self.roles) if role in ("user", "developer")), default=-1)

    def drops(self, position: int) -> bool:
        """Whether the reference drops this message together with old reasoning, and then miscounts."""
        keeps = self.roles[position] in ROLES and self.roles[position] != "developer"
        return self.thinking and position < self.last and not keeps

    def encode(self, position: int) -> list[str]:
        """Return the pieces of one message. Raises InvalidMessage."""
        message, is_last = self.turns[position], position == self.last
        if self.roles[position] in FIELDS:
            require_fields(message, ("role", *FIELDS[self.roles[position]]), f"a message of the {self.roles[position]}")
        match self.roles[position]:
            case "system":
                return [get_text(message, "content", ""), *_encode_tools(message), *_encode_response_format(message)]
            case "user":
                return [template.USER, get_text(message, "content"), template.ASSISTANT, self._open_turn(is_last)]
            case "developer":
                if not message.get("content"):
                    raise InvalidMessage("developer_empty_content", "a developer message needs content")
                lead = [*_encode_tools(message), *_encode_response_format(message), template.DEVELOPER]
                content = [*lead, get_text(message, "content")]
                return [template.USER, *content, template.ASSISTANT, self._open_turn(is_last)]
            case "assistant":
                reasoning = self._encode_reasoning(message) if position > self.last else []
                return [*reasoning, get_text(message, "content", ""), *_encode_calls(message), template.EOS]
            case "tool":
                if position in self.contradictions:
                    raise InvalidMessage("results_contradict_calls", self.contradictions[position])
                return self._encode_result(position)
            case role:
                raise InvalidMessage("unknown_role", UNKNOWN_ROLE.format(role[:40]))

    def _open_turn(self, thinks: bool) -> Mark:
        return template.THINK if thinks and self.thinking else template.THINK_END

    def _encode_reasoning(self, message: Message) -> list[str]:
        if not self.thinking:
            return []
        if not message.get("reasoning_content") and not message.get("tool_calls"):
            raise InvalidMessage(
                "assistant_missing_reasoning",
                "in thinking mode an answer after the last user message needs reasoning_content or tool_calls",
            )
        return [get_text(message, "reasoning_content", ""), template.THINK_END]

    def _encode_result(self, position: int) -> list[str]:
        """Encode a tool's result. The first opens the block; the last one hands the turn back to the model."""
        caller = next((i for i in range(position - 1, -1, -1) if self.roles[i] != "tool"), -1)
        if position > 0 and (caller < 0 or self.roles[caller] != "assistant"):
            raise InvalidMessage("tool_without_assistant", "it must follow an assistant message with tool calls")
        calls = self.turns[caller].get("tool_calls") if caller >= 0 else None
        count, order = len(calls) if isinstance(calls, list | tuple) else 0, position - caller
        if order > count:
            text = f"this is result {order}, but the assistant message made {pluralize(count, 'tool call')}"
            raise InvalidMessage("tool_without_calls", text)
        opening = [template.RESULTS] if order == 1 else []
        closing = [template.RESULTS_END, self._open_turn(position >= self.last)] if order == count else []
        return [*opening, template.RESULT, get_text(self.turns[position], "content"), template.RESULT_END, *closing]

    def describe_drop(self, position: int, earlier: int) -> Fault:
        """Return the fault of a message that `drops`; `earlier` messages come before the first that has an index."""
        index, role = position - earlier if position >= earlier else None, self.roles[position]
        name = f"context message {position}" if index is None else f"message {index}"
        reason = MISPLACED_DEVELOPER if role == "developer" else UNKNOWN_ROLE.format(role[:40])
        return Fault("index_out_of_range", index, f"{name}: {reason}")


def _encode_tools(message: Message) -> list[str]:
    schemas = [[schema] for schema in get_schemas(message)]
    return [template.LEAD, template.TOOLS, *_join_lines(schemas), template.TOOLS_END] if schemas else []


def _encode_response_format(message: Message) -> list[str]:
    schema = message.get("response_format")
    return [template.LEAD, template.RESPONSE_FORMAT, to_json(schema)] if schema else []


def _encode_calls(message: Message) -> list[str]:
    if isinstance(message.get("content"), template.Sampled):
        return []
    invokes = []
    for name, arguments in get_calls(message):
        parameters = [[template.PARAMETER, key, *_encode_value(value)] for key, value in arguments.items()]
        invokes.append([template.INVOKE, name, template.INVOKE_NAMED, *_join_lines(parameters), template.INVOKE_END])
    return [template.LEAD, template.CALLS, *_join_lines(invokes), template.CALLS_END] if invokes else []


def _encode_value(value: Any) -> list[str]:
    if isinstance(value, str):
        return [template.PARAMETER_STRING, value, template.PARAMETER_END]
    return [template.PARAMETER_JSON, to_json(value), template.PARAMETER_END]


def _join_lines(groups: list[list[str]]) -> list[str]:
    return [piece for group in groups for piece in (template.LINE, *group)][1:]
