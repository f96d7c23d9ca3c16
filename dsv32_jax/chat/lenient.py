"""From what a model really wrote to an assistant message: cut off, unclosed or loosely spaced text is read as well."""

import json
import re
from typing import Any, NamedTuple

from . import template
from .faults import ParsingError
from .messages import to_json
from .parsing import as_arguments, checked, message, read

BLOCK = re.compile(r"(?:\A|(?<=\n))[ \t]*(?:<｜DSML｜function_calls\s*>?|(?=<｜DSML｜invoke))")
BLOCK_END = re.compile(r"</｜DSML｜function_calls\s*>?")
INVOKE_END = re.compile(r"</｜DSML｜invoke\s*>?")
NAME = re.compile(r'\s*name\s*=\s*"([^"\n]*)"\s*>')
PARAMETER = re.compile(r'\s*name\s*=\s*"([^"\n]*)"(?:\s+string\s*=\s*"([^"\n]*)")?\s*>')
PARAMETER_END = re.compile(r"</｜DSML｜parameter\s*>?")
UNENDED = "the text ends without the end-of-sentence token"


class Lenient(NamedTuple):
    """An assistant message, and in words every liberty that was taken to read it."""

    message: dict[str, Any]
    forgiven: list[str]


def parse_lenient(text: str, *, thinking: bool) -> Lenient:
    """The assistant message in a completion that may be cut off or not quite in the format.

    Nothing but a wrong argument is an error. A call that is cut off or has no name is left out: running half of it
    would be worse. What looks like a call in closed reasoning is reasoning. Arguments are always JSON. `forgiven` is
    empty exactly where the text is well formed and complete; then the message is the one that `parse` gives.
    """
    checked(text, thinking)
    forgiven: list[str] = []

    def unmarked(key: str, value: str) -> str:
        if _is_json(value):
            return value
        if template.DSML in value:
            raise ParsingError("parameter_format", 0, f"the value of {key!r} seems not to be closed")
        forgiven.append(f"a value of {key!r} is not JSON; it was taken as a string")
        return to_json(value)

    ended = text + template.EOS if text.endswith(template.READ_CALLS_END) else text
    try:
        found = read(ended, thinking, unmarked)
    except ParsingError:
        return _loosely(text, thinking)
    if not ended.endswith(template.EOS):
        return _loosely(text, thinking)
    return Lenient(found, forgiven if ended == text else [*forgiven, UNENDED])


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _loosely(text: str, thinking: bool) -> Lenient:
    forgiven: list[str] = []
    body, eos, rest = text.partition(template.EOS)
    if not eos:
        forgiven.append(UNENDED)
    if rest:
        forgiven.append(f"{len(rest)} characters after the end-of-sentence token were left out")
    if body.startswith(template.BOS):
        forgiven.append("the text begins a sentence, which the prompt did")
        body = body.removeprefix(template.BOS)
    reasoning, body = _reasoning(body, thinking, forgiven)
    content, calls = _content(body, forgiven)
    held = [mark for mark in template.SCREENED if mark in content or mark in reasoning]
    if held:
        forgiven.append(f"the content or the reasoning holds {' and '.join(held)}")
    if not forgiven:
        forgiven.append("the spacing of the tags is not the format's")
    return Lenient(message(content, reasoning, calls), forgiven)


def _reasoning(body: str, thinking: bool, forgiven: list[str]) -> tuple[str, str]:
    """The reasoning, and what follows it."""
    opened = body.lstrip().startswith(template.THINK)
    if opened:
        body = body.lstrip().removeprefix(template.THINK)
        forgiven.append("the text opens the thinking, which the prompt did" if thinking else "the text thinks, unasked")
    if not thinking and not opened:
        if body.startswith(template.THINK_END):
            forgiven.append("the text closes the thinking, which the prompt did")
        return "", body.removeprefix(template.THINK_END)
    reasoning, closed, answer = body.partition(template.THINK_END)
    if closed:
        return reasoning, answer
    if block := BLOCK.search(body):
        forgiven.append("the thinking is not closed before the tool calls")
        return body[: block.start()].removesuffix("\n\n"), "\n\n" + body[block.start() :]
    forgiven.append("the thinking is not closed: there is no answer")
    return reasoning, ""


def _content(body: str, forgiven: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """The content, with what follows the tool calls, and the calls."""
    block = BLOCK.search(body)
    if block is None:
        return body, []
    content = body[: block.start()]
    if not content.endswith("\n\n") or not block[0].startswith("<") or not block[0].endswith("calls>"):
        forgiven.append("the tool calls do not begin as the format has it")
    content = content.removesuffix("\n").removesuffix("\n")
    end = BLOCK_END.search(body, block.end())
    if end is None:
        forgiven.append("the tool calls are not closed")
    inner = body[block.end() : end.start() if end else len(body)]
    before, *parts = inner.split(template.READ_INVOKE)
    calls = []
    for number, part in enumerate(parts):
        calls.append(_call(part, number, forgiven))
        if _open(part) and parts[number + 1 :]:
            forgiven.append(f"what follows tool call {number} may be in its unclosed parameter and was left out")
            break
    for stray in (before, body[end.end() :] if end else ""):
        if stray.strip():
            forgiven.append("text beside the tool calls was put behind the content")
            content += stray
    return content, [call for call in calls if call]


def _open(part: str) -> bool:
    """Whether the last parameter of a call is not closed: what looks like another call may be in its value."""
    last = part.rfind(template.READ_PARAMETER)
    return last >= 0 and PARAMETER_END.search(part, last) is None


def _call(part: str, number: int, forgiven: list[str]) -> tuple[str, str] | None:
    """The name and arguments of one call, or None where it must not be run."""
    name = NAME.match(part)
    end = INVOKE_END.search(part)
    called = f"tool call {number}" + (f" ({name[1]})" if name else "")
    if name is None or end is None:
        forgiven.append(f"{called} {'is cut off' if end is None else 'has no name'} and was left out")
        return None
    before, *parts = part[name.end() : end.start()].split(template.READ_PARAMETER)
    alone = before.strip() and not parts
    if (before.strip() and not alone) or part[end.end() :].strip():
        forgiven.append(f"{called} has text outside of its parameters, which was left out")
    if alone:
        return _object(name[1], before.strip(), called, forgiven)
    values: dict[str, str] = {}
    for parameter in parts:
        found = _parameter(parameter, called, forgiven)
        if found is None:
            return None
        if found[0] in values:
            forgiven.append(f"{called} gives {found[0]!r} twice; the last value counts")
        values[found[0]] = found[1]
    return name[1], as_arguments(values)


def _object(name: str, text: str, called: str, forgiven: list[str]) -> tuple[str, str] | None:
    """A call whose arguments are written as one JSON object."""
    if not (_is_json(text) and isinstance(json.loads(text), dict)):
        forgiven.append(f"{called} has neither parameters nor a JSON object and was left out")
        return None
    forgiven.append(f"{called} gives its arguments as a JSON object")
    return name, text


def _parameter(part: str, called: str, forgiven: list[str]) -> tuple[str, str] | None:
    """The name and JSON value of one parameter, or None where the call must not be run."""
    head = PARAMETER.match(part)
    end = head and PARAMETER_END.search(part, head.end())
    if head is None or end is None:
        forgiven.append(f"{called} has a parameter that is {'not closed' if head else 'not named'} and was left out")
        return None
    value, said = part[head.end() : end.start()], head[2]
    if part[end.end() :].strip():
        forgiven.append(f"{called} has text behind {head[1]!r}, which was left out")
    if said not in ("true", "false"):
        forgiven.append(f"{called} does not say whether {head[1]!r} is a string")
    if said != "true" and _is_json(value):
        return head[1], value
    if said == "false":
        forgiven.append(f"{called} has a value of {head[1]!r} that is not JSON; it was taken as a string")
    return head[1], to_json(value)
