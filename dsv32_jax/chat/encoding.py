"""From messages to the prompt: what the reference encoder of DeepSeek-V3.2 writes, byte for byte."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import template
from .dialogue import Dialogue, listed, no_role
from .faults import EncodingError, Fault, Malformed
from .messages import Message, arguments, call_count, calls, schemas, text, to_json


def encode(
    messages: Sequence[Message],
    *,
    thinking: bool,
    tools: Sequence[Mapping] | None = None,
    context: Sequence[Message] = (),
    drop_thinking: bool = True,
    bos: bool = True,
) -> str:
    """The prompt of `messages`, OpenAI-shaped dicts, up to where the model goes on.

    role       what is read of it
    system     content, tools, response_format
    user       content
    developer  content, tools, response_format
    assistant  content, reasoning_content, tool_calls (`arguments` is the JSON text of an object)
    tool       content; results belong to the calls before them in order, whatever their ids

    `thinking`       whether the model thinks before it answers. Reasoning is written only after the last user or
                     developer message; chat mode writes none.
    `tools`          schemas for the first message if it is a system or developer message, else written before it.
    `context`        earlier messages: they count, but are not written, and nor is the beginning-of-sentence token.
    `drop_thinking`  False admits a developer message before a later user turn, which the format otherwise cannot hold.
    `bos`            False leaves the beginning-of-sentence token out.

    As in the reference, content passes through as it is, so a string that looks like a special token becomes one
    where the prompt is tokenized as a whole; `prepare` makes token ids that content cannot forge. As there too, a
    user's or tool's content that is None or a number is written as Python writes it. Content that is a list or an
    object is refused. Raises EncodingError, which lists every bad message.
    """
    return "".join(
        pieces(messages, thinking=thinking, tools=tools, context=context, drop_thinking=drop_thinking, bos=bos)
    )


def pieces(messages, *, thinking, tools=None, context=(), drop_thinking=True, bos=True) -> list[str]:
    """What `encode` joins: a Mark where the text is the format's own, any other string where it came with a message."""
    if type(thinking) is not bool:
        wrong = f"thinking must be True (thinking) or False (chat), not {thinking!r}"
        raise EncodingError([Fault("invalid_thinking_mode", None, wrong)])
    given, earlier = listed(messages, "messages"), listed(context, "context")
    dialogue = Dialogue.of(earlier + given, thinking)
    written: list[str] = [template.BOS] if bos and not earlier else []
    faults: list[Fault] = []
    if tools and dialogue.turns and dialogue.roles[0] in ("system", "developer"):
        dialogue = dialogue.with_tools(tools)
    elif tools and not earlier:
        written += _attempt(faults, None, "tools", _tools, {"tools": tools})
    for position in range(len(earlier), len(dialogue.turns)):
        if not (drop_thinking and dialogue.drops(position)):
            index, role = position - len(earlier), dialogue.roles[position]
            writer = WRITERS.get(role, _unknown)
            written += _attempt(faults, index, f"message {index} ({role:.40})", writer, dialogue, position)
    if drop_thinking and given:
        faults += dialogue.dropped(len(earlier))
    if faults:
        raise EncodingError(faults)
    return written


def _attempt(faults: list[Fault], index: int | None, name: str, write: Callable[..., list[str]], *given) -> list[str]:
    """What `write` writes; nothing, and a fault more, where it cannot."""
    try:
        return write(*given)
    except Malformed as error:
        faults.append(Fault(error.code, index, f"{name}: {error}"))
        return []


def _unknown(dialogue: Dialogue, position: int) -> list[str]:
    raise Malformed("unknown_role", no_role(dialogue.roles[position]))


def _system(dialogue: Dialogue, position: int) -> list[str]:
    message = dialogue.turns[position]
    return [text(message, "content", none=""), *_tools(message), *_response_format(message)]


def _tools(message: Message) -> list[str]:
    """The tools block of a system or developer message, which opens with a blank line."""
    found = schemas(message)
    if not found:
        return []
    return [template.LEAD, template.TOOLS, *_joined([[schema] for schema in found]), template.TOOLS_END]


def _response_format(message: Message) -> list[str]:
    wanted = message.get("response_format")
    return [template.LEAD, template.RESPONSE_FORMAT, to_json(wanted)] if wanted else []


def _user(dialogue: Dialogue, position: int) -> list[str]:
    content = text(dialogue.turns[position], "content")
    return [template.USER, content, template.ASSISTANT, dialogue.think(position == dialogue.last)]


def _developer(dialogue: Dialogue, position: int) -> list[str]:
    message = dialogue.turns[position]
    if not message.get("content"):
        raise Malformed("developer_empty_content", "a developer message needs content")
    content = [*_tools(message), *_response_format(message), template.DEVELOPER, text(message, "content")]
    return [template.USER, *content, template.ASSISTANT, dialogue.think(position == dialogue.last)]


def _assistant(dialogue: Dialogue, position: int) -> list[str]:
    message = dialogue.turns[position]
    reasoning: list[str] = []
    if dialogue.thinking and position > dialogue.last:
        if not message.get("reasoning_content") and not message.get("tool_calls"):
            raise Malformed(
                "assistant_missing_reasoning",
                "in thinking mode an answer after the last user message needs reasoning_content or tool_calls",
            )
        reasoning = [text(message, "reasoning_content", none=""), template.THINK_END]
    return [*reasoning, text(message, "content", none=""), *_calls(message), template.EOS]


def _calls(message: Message) -> list[str]:
    found = calls(message)
    if not found:
        return []
    invokes = [_invoke(function["name"], arguments(function)) for function in found]
    return [template.LEAD, template.CALLS, *_joined(invokes), template.CALLS_END]


def _invoke(name: str, given: dict) -> list[str]:
    parameters = [[template.PARAMETER, key, *_value(value), template.PARAMETER_END] for key, value in given.items()]
    return [template.INVOKE, name, template.INVOKE_NAMED, *_joined(parameters), template.INVOKE_END]


def _value(value: Any) -> list[str]:
    if isinstance(value, str):
        return [template.PARAMETER_STRING, value]
    return [template.PARAMETER_JSON, to_json(value)]


def _tool(dialogue: Dialogue, position: int) -> list[str]:
    """One result: the first opens the block, the one that completes it gives the word to the model again."""
    caller = next((i for i in range(position - 1, -1, -1) if dialogue.roles[i] != "tool"), -1)
    if position > 0 and (caller < 0 or dialogue.roles[caller] != "assistant"):
        raise Malformed("tool_without_assistant", "a tool result needs an assistant message with tool calls before it")
    order = position - caller
    count = call_count(dialogue.turns[caller]) if caller >= 0 else 0
    if order > count:
        raise Malformed(
            "tool_without_calls", f"this is result {order}, but the assistant message before made {count} tool calls"
        )
    written = [template.RESULT, text(dialogue.turns[position], "content"), template.RESULT_END]
    if order == 1:
        written = [template.RESULTS, *written]
    if order == count:
        written += [template.RESULTS_END, dialogue.think(position >= dialogue.last)]
    return written


def _joined(groups: list[list[str]]) -> list[str]:
    """The groups with a line break between each two."""
    return [piece for group in groups for piece in (template.LINE, *group)][1:]


WRITERS: dict[str, Callable[[Dialogue, int], list[str]]] = {
    "system": _system,
    "user": _user,
    "developer": _developer,
    "assistant": _assistant,
    "tool": _tool,
}
