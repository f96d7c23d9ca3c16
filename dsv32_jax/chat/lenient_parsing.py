"""Parse the text a model really wrote: cut off, unclosed or loosely spaced."""

import json
import re
from typing import Any, NamedTuple

from . import template
from .messages import to_json
from .parsing import ParsingError, build_message, join_arguments, parse_strictly, require_completion

BLOCK = re.compile(r"(?:\A|(?<=\n))[ \t]*(?:<｜DSML｜function_calls\s*>?|(?=<｜DSML｜invoke))")
BLOCK_END = re.compile(r"</｜DSML｜function_calls\s*>?")
INVOKE_END = re.compile(r"</｜DSML｜invoke\s*>?")
NAME = re.compile(r'\s*name\s*=\s*"([^"\n]*)"\s*>')
PARAMETER = re.compile(r'\s*name\s*=\s*"([^"\n]*)"(?:\s+string\s*=\s*"([^"\n]*)")?\s*>')
PARAMETER_END = re.compile(r"</｜DSML｜parameter\s*>?")
UNENDED = "the text ends without the end-of-sentence token"


class LenientMessage(NamedTuple):
    """An assistant message, and a sentence for every deviation from the format."""

    message: dict[str, Any]
    warnings: list[str]


def parse_lenient(text: str, *, thinking: bool) -> LenientMessage:
    """Return the assistant message in a completion that may be cut off or malformed, with warnings.

    A call that is cut off or has no name is dropped, because half of it must not be run. Calls quoted in closed
    reasoning stay reasoning. Arguments are always JSON. `warnings` is empty exactly where the text is well-formed and
    complete; then the message is the one `parse` returns. Raises UsageError on arguments of the wrong type.
    """
    require_completion(text, thinking)
    warnings: list[str] = []

    def to_value(key: str, value: str) -> str:
        if _is_json(value):
            return value
        if template.DSML in value:
            raise ParsingError("parameter_format", 0, f"the value of {key!r} seems unclosed")
        warnings.append(f"the value of {key!r} is not JSON; read as a string")
        return to_json(value)

    ended = text + template.EOS if text.endswith(template.READ_CALLS_END) else text
    if not ended.endswith(template.EOS):
        return _parse_loosely(text, thinking)
    try:
        message = parse_strictly(ended, thinking, to_value)
    except ParsingError:
        return _parse_loosely(text, thinking)
    return LenientMessage(message, warnings if ended == text else [*warnings, UNENDED])


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parse_loosely(text: str, thinking: bool) -> LenientMessage:
    warnings: list[str] = []
    body, eos, rest = text.partition(template.EOS)
    if not eos:
        warnings.append(UNENDED)
    if rest:
        warnings.append(f"ignored {len(rest)} characters after the end-of-sentence token")
    if body.startswith(template.BOS):
        warnings.append("ignored a second beginning-of-sentence token")
        body = body.removeprefix(template.BOS)
    reasoning, body = _split_reasoning(body, thinking, warnings)
    content, calls = _split_calls(body, warnings)
    if marks := [mark for mark in template.SCREENED if mark in content or mark in reasoning]:
        warnings.append(f"the content or the reasoning holds {' and '.join(marks)}")
    return LenientMessage(build_message(content, reasoning, calls), warnings or ["unusual spacing in the tags"])


def _split_reasoning(body: str, thinking: bool, warnings: list[str]) -> tuple[str, str]:
    """Return the reasoning and what follows it."""
    opened = body.lstrip().startswith(template.THINK)
    if opened:
        body = body.lstrip().removeprefix(template.THINK)
        warnings.append("ignored a second <think>" if thinking else "the answer begins with reasoning in chat mode")
    if not thinking and not opened:
        if body.startswith(template.THINK_END):
            warnings.append("ignored a second </think>")
        return "", body.removeprefix(template.THINK_END)
    reasoning, closed, answer = body.partition(template.THINK_END)
    if closed:
        return reasoning, answer
    if block := BLOCK.search(body):
        warnings.append("the reasoning is not closed before the tool calls")
        return body[: block.start()].removesuffix("\n\n"), "\n\n" + body[block.start() :]
    warnings.append("the reasoning is not closed: there is no answer")
    return reasoning, ""


def _split_calls(body: str, warnings: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """Return the content, followed by any text beside the tool calls, and the calls."""
    block = BLOCK.search(body)
    if block is None:
        return body, []
    content = body[: block.start()]
    if not content.endswith("\n\n") or not block[0].startswith("<") or not block[0].endswith("calls>"):
        warnings.append("the opening tag of the tool calls is malformed")
    content = content.removesuffix("\n").removesuffix("\n")
    end = BLOCK_END.search(body, block.end())
    if end is None:
        warnings.append("the tool calls are not closed")
    inner, after = (body[block.end() : end.start()], body[end.end() :]) if end else (body[block.end() :], "")
    before, *parts = inner.split(template.READ_INVOKE)
    calls = []
    for number, part in enumerate(parts):
        name = NAME.match(part)
        label = f"tool call {number}" + (f" ({name[1]})" if name else "")
        try:
            calls.append(_parse_call(part, name, label, warnings))
        except _Dropped as reason:
            warnings.append(f"dropped {label}: {reason}")
        last = part.rfind(template.READ_PARAMETER)
        if parts[number + 1 :] and last >= 0 and not PARAMETER_END.search(part, last):
            warnings.append(f"ignored what follows tool call {number}: it may belong to its unclosed parameter")
            break
    for stray in (before, after):
        if stray.strip():
            warnings.append("text beside the tool calls was appended to the content")
            content += stray
    return content, calls


class _Dropped(Exception):
    """A call that must not be run."""


def _parse_call(part: str, name: re.Match | None, label: str, warnings: list[str]) -> tuple[str, str]:
    """Return name and arguments of one call. Raises _Dropped."""
    end = INVOKE_END.search(part)
    if name is None or end is None:
        raise _Dropped("it is cut off" if end is None else "it has no name")
    before, *parameters = part[name.end() : end.start()].split(template.READ_PARAMETER)
    text = before.strip()
    if (text and parameters) or part[end.end() :].strip():
        warnings.append(f"{label}: ignored text outside its parameters")
    if text and not parameters:
        if not (_is_json(text) and isinstance(json.loads(text), dict)):
            raise _Dropped("it has neither parameters nor a JSON object")
        warnings.append(f"{label}: its arguments are written as a JSON object")
        return name[1], text
    values: dict[str, str] = {}
    for parameter in parameters:
        key, value = _parse_parameter(parameter, label, warnings)
        if key in values:
            warnings.append(f"{label}: {key!r} appears twice; the last value counts")
        values[key] = value
    return name[1], join_arguments(values)


def _parse_parameter(part: str, label: str, warnings: list[str]) -> tuple[str, str]:
    """Return the name and JSON value of one parameter. Raises _Dropped."""
    head = PARAMETER.match(part)
    end = head and PARAMETER_END.search(part, head.end())
    if head is None or end is None:
        raise _Dropped(f"a parameter {'is not closed' if head else 'has no name'}")
    (key, is_string), value = head.groups(), part[head.end() : end.start()]
    if part[end.end() :].strip():
        warnings.append(f"{label}: ignored text after {key!r}")
    if is_string not in ("true", "false"):
        warnings.append(f"{label}: {key!r} is not marked as a string or JSON")
    if is_string != "true" and _is_json(value):
        return key, value
    if is_string == "false":
        warnings.append(f"{label}: the value of {key!r} is not JSON; read as a string")
    return key, to_json(value)
