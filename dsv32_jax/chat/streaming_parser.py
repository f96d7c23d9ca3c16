"""A completion as it streams, in its parts: reasoning, content, and tool calls with their arguments as JSON text.

Joined, the parts are what `parse` returns for a well-formed completion, however its text is split. Tags never appear in
a part; text that may begin one is held back until that is decided.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from ..generation.detokenizer import CALLS_START, StopStrings
from . import template
from .lenient_parser import DroppedCall, read_value
from .messages import is_json, to_json

REASONING, CONTENT, CALL, ARGUMENTS = "reasoning", "content", "call", "arguments"

OPEN, CLOSE = f"<{template.DSML}", f"</{template.DSML}"
VALUE_END = f"{CLOSE}parameter"
TAG = re.compile(r'((?:[^">\n]|"[^"\n]*")*)[>\n]')
"""The rest of a tag, to its end or that of the line."""
OPENING = re.compile(r'(function_calls|invoke|parameter)(?:\s*name\s*=\s*("[^"]*"))?(?:\s+string\s*=\s*"([^"]*)")?\s*')


class Piece(NamedTuple):
    """Text of a part: REASONING, CONTENT, ARGUMENTS of the last call, or CALL, a function's name that begins a call."""

    part: str
    text: str


class StreamingParser:
    """Splits one completion.

    part      the one that the next text belongs to; CALL from the first tool call on
    calls     how many there are;  is_whole: whether the last one is complete
    warnings  a sentence for each deviation from the format. After a malformed call nothing more is returned: its
              arguments stay open, so that nobody runs half of it
    """

    def __init__(self, *, thinking: bool):
        self.part, self.is_whole, self.calls = REASONING if thinking else CONTENT, True, 0
        self.warnings: list[str] = []
        self._read = self._read_reasoning if thinking else self._read_content
        self._stops = StopStrings(template.THINK_END if thinking else CALLS_START)
        self._tag = self._stray = ""
        self._keys: list[str] = []
        self._key, self._is_string, self._value = "", False, ""

    def add(self, text: str) -> list[Piece]:
        """Return what can be assigned now that more text is there."""
        pieces: list[Piece] = []
        rest: str | None = text
        while rest is not None:
            rest = None
            for found in self._read(text):
                if isinstance(found, Piece):
                    pieces.append(found)
                else:
                    text = rest = found
        return [piece for piece in pieces if piece.text]

    def end(self) -> list[Piece]:
        """Return what was held back, at the end of the completion."""
        held = self._stops.end()
        if self.part == REASONING:
            self.warnings.append("the reasoning is not closed: there is no answer")
        if self.part != CALL:
            return [Piece(self.part, held)] if held else []
        if not self.is_whole and self._read != self._ignore:
            self.warnings.append(f"tool call {self.calls - 1} is cut off")
        return []

    def _read_reasoning(self, text: str) -> Iterator[Piece | str]:
        yield Piece(REASONING, self._stops.add(text))
        if self._stops.hit is not None:
            self.part = CONTENT
            yield self._switch_to(self._read_content, *CALLS_START)

    def _read_content(self, text: str) -> Iterator[Piece | str]:
        yield Piece(CONTENT, self._stops.add(text))
        if self._stops.hit is not None:
            self.part = CALL
            yield self._switch_to(self._read_opening)

    def _read_between(self, text: str) -> Iterator[Piece | str]:
        """Between tags only space is expected, or the arguments of a call as one JSON object."""
        self._stray += self._stops.add(text)
        if self.is_whole and self._stray.strip():
            self.warnings.append("text outside the tool calls was appended to the content")
            yield Piece(CONTENT, self._stray)
            self._stray = ""
        if self._stops.hit is not None:
            yield self._switch_to(self._read_opening if self._stops.hit == OPEN else self._read_closing)

    def _read_opening(self, text: str) -> Iterator[Piece | str]:
        tag, rest = self._complete(text)
        if tag is None:
            return
        kind, quoted, is_string = found.groups("") if (found := OPENING.fullmatch(tag)) else ("", "", "")
        name = quoted[1:-1]
        if not kind or bool(quoted) == (kind == "function_calls") or self.is_whole == (kind == "parameter"):
            yield self._reject(f"the tag {tag[:60]!r} is malformed or misplaced")
        elif kind == "parameter" and (name in self._keys or self._stray.strip()):
            yield self._reject(f"{name!r} appears twice, or after other text")
        elif kind == "parameter":
            self._key, self._is_string, self._value = name, is_string == "true", ""
            yield Piece(ARGUMENTS, f"{', ' if self._keys else '{'}{to_json(name)}: " + '"' * self._is_string)
            self._keys.append(name)
            yield self._switch_to(self._read_value, VALUE_END, rest=rest)
        else:
            if kind == "invoke":
                self.is_whole, self.calls, self._keys = False, self.calls + 1, []
                yield Piece(CALL, name)
            self._stray = ""
            yield self._switch_to(self._read_between, OPEN, CLOSE, rest=rest)

    def _read_value(self, text: str) -> Iterator[Piece | str]:
        value = self._stops.add(text)
        if self._is_string:
            yield Piece(ARGUMENTS, to_json(value)[1:-1])
        self._value += "" if self._is_string else value
        if self._stops.hit is None:
            return
        try:
            yield Piece(ARGUMENTS, '"' if self._is_string else read_value(self._key, self._value, self.warnings))
            self._tag = "parameter"
            yield self._switch_to(self._read_closing)
        except DroppedCall as reason:
            yield self._reject(str(reason))

    def _read_closing(self, text: str) -> Iterator[Piece | str]:
        tag, rest = self._complete(text)
        if tag is None:
            return
        if tag.strip() == "invoke" and not self.is_whole:
            whole = self._stray.strip()
            if whole and (self._keys or not (whole.startswith("{") and is_json(whole))):
                yield self._reject("text beside its parameters")
                return
            if whole:
                self.warnings.append(f"tool call {self.calls - 1}: its arguments are written as a JSON object")
            self.is_whole = True
            yield Piece(ARGUMENTS, "}" if self._keys else whole or "{}")
        elif tag.strip() != "parameter" and (tag.strip() != "function_calls" or not self.is_whole):
            yield self._reject(f"the tag {'/' + tag[:60]!r} is malformed or misplaced")
            return
        if self.is_whole:
            self._stray = ""
        yield self._switch_to(self._read_between, OPEN, CLOSE, rest=rest)

    def _ignore(self, text: str) -> Iterator[Piece | str]:
        """Return nothing of what follows a malformed call, because it may belong to it."""
        yield from ()

    def _complete(self, text: str) -> tuple[str | None, str]:
        """Return the tag that has begun and what follows it; None while it has no end."""
        self._tag += text
        if (found := TAG.match(self._tag)) is None and "\n" not in self._tag:
            return None, ""
        tag, rest = (found[1], self._tag[found.end() :]) if found else (self._tag, "")
        self._tag = ""
        return tag, rest

    def _reject(self, reason: str) -> str:
        self.is_whole = False
        self.warnings.append(f"tool call {max(0, self.calls - 1)}: {reason}. What follows was ignored")
        return self._switch_to(self._ignore)

    def _switch_to(self, read, *stops: str, rest: str | None = None) -> str:
        """Read what follows, which is returned, in another way."""
        rest = self._stops.rest if rest is None else rest
        self._read, self._stops = read, StopStrings(stops)
        return rest
