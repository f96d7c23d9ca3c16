"""Parse a completion into an assistant message as models really write: cut off, unclosed, loosely spaced."""

import itertools
import re
from typing import Any, NamedTuple

from . import template
from .messages import is_json, to_json
from .strict_parser import ParsingError, parse_strictly, require_completion
from .tool_calls import build_message, join_arguments

BLOCK = re.compile(r"(?:\A|(?<=\n))[ \t]*(?:<｜DSML｜function_calls\s*>?|(?=<｜DSML｜invoke))")
TAG = re.compile(
    r'<｜DSML｜parameter\s*name\s*=\s*"(?P<key>[^"\n]*)"(?:\s+string\s*=\s*"(?P<string>[^"\n]*)")?\s*(?P<value>>)'
    r'|<｜DSML｜invoke\s*name\s*=\s*"(?P<name>[^"\n]*)"\s*(?P<call>>)'
    r"|</｜DSML｜(?:(?P<value_end>parameter)|(?P<call_end>invoke)|(?P<block_end>function_calls))\s*>?"
)
DEPTH = {"value": 1, "value_end": -1}
UNENDED = "the text ends without the end-of-sentence token"
MALFORMED = (
    "it is cut off, it has no name, or text outside its parameters, or a parameter has no name or is not closed. "
    "What follows was ignored, because it may belong to it"
)


class LenientMessage(NamedTuple):
    """An assistant message, and a sentence for every deviation from the format."""

    message: dict[str, Any]
    warnings: list[str]


class DroppedCall(Exception):
    """A call that must not be run."""


def parse_lenient(text: str, *, thinking: bool) -> LenientMessage:
    """Return the assistant message in a completion that may be cut off or malformed, with warnings.

    A call is dropped if anything of it is missing or left over, because half of it must not be run. Where a value holds
    tags of the format, the reading counts in which everything closes. Calls quoted in closed reasoning stay reasoning.
    Arguments are always JSON. `warnings` is empty exactly where the text is well-formed and complete; then the message
    is the one `parse` returns. Raises UsageError on arguments of the wrong type.
    """
    require_completion(text, thinking)
    warnings: list[str] = []
    ended = text + template.EOS if text.endswith(template.READ_CALLS_END) else text
    if ended.endswith(template.EOS):
        try:
            message = parse_strictly(ended, thinking, lambda key, value: read_value(key, value, warnings))
            if not any(template.DSML in call["function"]["name"] for call in message["tool_calls"]):
                return LenientMessage(message, warnings if ended == text else [*warnings, UNENDED])
        except (ParsingError, DroppedCall):
            pass
        warnings.clear()
    body, eos, rest = text.partition(template.EOS)
    if not eos:
        warnings.append(UNENDED)
    if rest:
        warnings.append(f"ignored {len(rest)} characters after the end-of-sentence token")
    if body.startswith(template.BOS):
        warnings.append("ignored a second beginning-of-sentence token")
        body = body.removeprefix(template.BOS)
    reasoning, body = _split_reasoning(body, thinking, warnings)
    content, calls = _split_calls(body, bool(eos), warnings)
    if marks := [mark for mark in template.SCREENED if mark in content or mark in reasoning]:
        warnings.append(f"the content or the reasoning holds {' and '.join(marks)}")
    return LenientMessage(build_message(content, reasoning, calls), warnings or ["unusual spacing in the tags"])


def _split_reasoning(body: str, thinking: bool, warnings: list[str]) -> tuple[str, str]:
    """Return the reasoning and what follows it."""
    if body.lstrip().startswith(template.THINK):
        body = body.lstrip().removeprefix(template.THINK)
        warnings.append("ignored a second <think>" if thinking else "the answer begins with reasoning in chat mode")
    elif not thinking:
        if body.startswith(template.THINK_END):
            warnings.append("ignored a second </think>")
        return "", body.removeprefix(template.THINK_END)
    reasoning, closed, answer = body.partition(template.THINK_END)
    if not closed and (block := BLOCK.search(body)):
        warnings.append("the reasoning is not closed before the tool calls")
        return body[: block.start()].removesuffix("\n\n"), "\n\n" + body[block.start() :]
    if not closed:
        warnings.append("the reasoning is not closed: there is no answer")
    return reasoning, answer


def _split_calls(body: str, ended: bool, warnings: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """Return the content, followed by any text beside the tool calls, and the calls."""
    block = BLOCK.search(body)
    if block is None:
        return body, []
    content = body[: block.start()]
    if not content.endswith("\n\n") or not block[0].startswith("<") or not block[0].endswith("calls>"):
        warnings.append("the opening tag of the tool calls is malformed")
    content, tags = content.removesuffix("\n").removesuffix("\n"), list(TAG.finditer(body, block.end()))
    following = _find_following(body, tags)
    is_closed = bool(tags) and tags[-1].lastgroup == "block_end" and not body[tags[-1].end() :].strip()
    calls, strays, at, i, number = [], [], block.end(), 0, 0
    while i < len(tags) and tags[i].lastgroup == "call" and following[i] is not None:
        strays.append(body[at : tags[i].start()])
        path = [i]
        while tags[path[-1]].lastgroup != "call_end":
            path.append(following[path[-1]])
        label = f"tool call {number} ({tags[i]['name']})"
        try:
            calls.append(_read_call(body, [tags[j] for j in path], is_closed, label, warnings))
        except DroppedCall as reason:
            warnings.append(f"dropped {label}: {reason}")
        at, i, number = tags[path[-1]].end(), following[path[-1]], number + 1
    tail = body[at:]
    if i < len(tags) and tags[i].lastgroup == "block_end":
        strays.append(body[at : tags[i].start()])
        tail = body[tags[i].end() :]
    else:
        warnings.append("the tool calls are not closed")
    if template.READ_INVOKE in tail:
        warnings.append(f"dropped tool call {number}: {MALFORMED}")
    elif not any(tag.startswith(tail.strip()) for tag in (template.READ_CALLS_END, template.READ_INVOKE, template.EOS)):
        strays.append(tail)
        if calls and not ended:
            warnings.append(f"dropped the call to {calls.pop()[0]}: it may be cut off, as text follows its end")
    if stray := "".join(text for text in strays if text.strip()):
        warnings.append("text outside the tool calls was appended to the content")
    return content + stray, calls


def _find_following(text: str, tags: list[re.Match]) -> list[Any]:
    """Return for each tag the index of the one that follows it in a reading in which everything closes, None where
    there is none, and the number of tags at the end.

    A value ends at a tag after which only space and tags that may follow come, to the end of the call. The first one
    counts before which the value has as many beginnings as ends of values, as where it quotes calls; else the first.
    """
    found: list[int | None] = [None] * len(tags)
    depth = [0, *itertools.accumulate(DEPTH.get(str(tag.lastgroup), 0) for tag in tags)]
    first_end: dict[int | None, int] = {}
    for i in reversed(range(len(tags))):
        kind, after = str(tags[i].lastgroup), i + 1
        upcoming = tags[after].lastgroup if after < len(tags) else None
        if kind == "value":
            found[i] = first_end.get(depth[after], first_end.get(None))
        elif kind == "call_end":
            is_last = upcoming is None or (upcoming == "block_end" and after + 1 == len(tags))
            found[i] = after if is_last or upcoming == "call" else None
        elif upcoming in ("value", "call_end") and found[after] is not None:
            is_object = (kind, upcoming) == ("call", "call_end")
            found[i] = after if is_object or not text[tags[i].end() : tags[after].start()].strip() else None
        if kind == "value_end" and found[i] is not None:
            first_end[depth[i]] = first_end[None] = i
    return found


def _read_call(body: str, tags: list[re.Match], is_closed: bool, label: str, warnings: list[str]) -> tuple[str, str]:
    """Return the name and the arguments of the call with these tags. Raises DroppedCall."""
    opening, *inner, closing = tags
    if not inner and (text := body[opening.end() : closing.start()].strip()):
        if not (text.startswith("{") and is_json(text)):
            raise DroppedCall("it has neither parameters nor a JSON object")
        warnings.append(f"{label}: its arguments are written as a JSON object")
        return opening["name"], text
    values: dict[str, str] = {}
    for head, end in zip(inner[::2], inner[1::2], strict=True):
        key, is_string, value = head["key"], head["string"], body[head.end() : end.start()]
        if key in values:
            raise DroppedCall(f"{key!r} appears twice")
        if template.DSML in value and not is_closed:
            raise DroppedCall(f"{key!r} holds tags of the format, and what follows does not close")
        if is_string not in ("true", "false"):
            warnings.append(f"{label}: {key!r} is not marked as a string or JSON")
        values[key] = to_json(value) if is_string == "true" else read_value(key, value, warnings)
    return opening["name"], join_arguments(values)


def read_value(key: str, text: str, warnings: list[str]) -> str:
    """Return the JSON of a value that is not marked as a string. Raises DroppedCall where it seems to be unclosed."""
    if is_json(text):
        return text
    if template.DSML in text:
        raise DroppedCall(f"an unclosed parameter: the value of {key!r} is not JSON and holds tags of the format")
    warnings.append(f"the value of {key!r} is not JSON; read as a string")
    return to_json(text)
