"""One streamed answer on the screen: reasoning dimmed or hidden, text verbatim, tool calls only counted."""

import time
from collections.abc import Iterable

from ..chat.streaming_parser import ARGUMENTS, CALL, CONTENT, Piece, StreamingParser
from ..errors import pluralize
from ..generation.result import Stats
from .terminal import Screen


class AnswerView:
    """Show an answer piece by piece."""

    def __init__(self, screen: Screen, *, thinking: bool, hide_reasoning: bool):
        self._screen, self._hide_reasoning = screen, hide_reasoning
        self._parts = StreamingParser(thinking=thinking)
        self._part, self._last_char = self._parts.part, ""
        self._tokens, self._start = 0, time.perf_counter()

    def add(self, text: str) -> None:
        """Show the text of one more token."""
        self._start = self._start if self._tokens else time.perf_counter()
        self._tokens += 1
        self._show(self._parts.add(text))
        self._switch_to(self._parts.part)
        if self._part == CALL:
            self._screen.status(f"calling: {pluralize(self._tokens, 'token')}")

    def end(self) -> None:
        """Show what is left, at the end of the answer."""
        self._show(self._parts.end())
        self._switch_to("")
        self._screen.status("")

    def _show(self, pieces: Iterable[Piece]) -> None:
        for part, text in pieces:
            if part in (CALL, ARGUMENTS):
                continue
            self._switch_to(part)
            self._last_char = text[-1]
            if part == CONTENT:
                self._screen.result(text)
            elif self._hide_reasoning:
                self._screen.status(f"thinking: {pluralize(self._tokens, 'token')} (Ctrl-C stops it)")
            else:
                self._screen.aside(text)

    def _switch_to(self, part: str) -> None:
        """Finish the part shown so far, unless it goes on."""
        if part == self._part:
            return
        if self._last_char and self._part == CONTENT:
            self._screen.result("\n" * (self._last_char != "\n"))
        elif self._last_char and self._hide_reasoning:
            self._screen.note(f"(thought for {time.perf_counter() - self._start:.1f} s; /think show shows it)")
        elif self._last_char:
            self._screen.aside("\n\n")
        self._part, self._last_char = part, ""


def describe_stats(stats: Stats) -> str:
    """Return how many tokens were read and generated, and how fast."""
    rates = (stats.prefill_tokens_per_second, stats.decode_tokens_per_second)
    read, generated = (f" at {rate:.{1 if rate < 100 else 0}f} tokens/s" if rate else "" for rate in rates)
    done, least = ("loading compiled programs", 2) if stats.loads == stats.compiles else ("compiling", 0.05)
    compiled = f"; {done} took {stats.compile_seconds:.1f} s" if stats.compile_seconds > least else ""
    return (
        f"read {pluralize(stats.prompt_tokens, 'prompt token')}{read}, "
        f"generated {pluralize(stats.new_tokens, 'token')}{generated}{compiled}"
    )
