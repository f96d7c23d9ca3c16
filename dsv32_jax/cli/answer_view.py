"""One streamed answer on the screen: reasoning dimmed or hidden, text verbatim, tool calls only counted."""

import time
from collections.abc import Iterator

from ..chat import StopStrings, template
from ..errors import pluralize
from ..generation.result import Token
from ..system.compilation import Compilations
from .screen import Screen

REASONING, ANSWER, CALLS = "reasoning", "answer", "calls"

CALLS_START = ("\n\n<" + template.DSML, "<" + template.DSML)


class AnswerSplitter:
    """Split a streamed answer into its parts. Text that may begin a tag is held back until that is decided."""

    def __init__(self, *, thinking: bool):
        self.part = REASONING if thinking else ANSWER
        self._stops = StopStrings(template.THINK_END if thinking else CALLS_START)

    def add(self, text: str) -> Iterator[tuple[str, str]]:
        """Yield (part, text) for what can be assigned now, without tags and without tool calls."""
        for char in text:
            if self.part == CALLS:
                continue
            if piece := self._stops.add(char):
                yield self.part, piece
            if self._stops.hit is not None:
                self.part, self._stops = (ANSWER if self.part == REASONING else CALLS), StopStrings(CALLS_START)

    def end(self) -> Iterator[tuple[str, str]]:
        """Yield what was held back, at the end of the answer."""
        if piece := self._stops.end():
            yield self.part, piece


class AnswerView:
    """Show an answer token by token, and keep its text and its times."""

    def __init__(self, screen: Screen, compiled: Compilations, *, thinking: bool, hide_reasoning: bool):
        self._screen, self._compiled, self._hide_reasoning = screen, compiled, hide_reasoning
        self._splitter = AnswerSplitter(thinking=thinking)
        self._part, self._last_char = self._splitter.part, ""
        self._start = self._first = self._last = time.perf_counter()
        self._compiled_before_first = 0.0
        self.text, self.tokens, self.prompt_read = "", 0, 0
        self.last_token, self.finish_reason = -1, "interrupted"

    def show_prefill(self, read: int) -> None:
        """Show how many tokens of the prompt were read."""
        self.prompt_read = read
        self._screen.status(f"reading: {read} tokens")

    def add(self, token: Token) -> None:
        """Show one more token."""
        self._last = time.perf_counter()
        if not self.tokens:
            self._first, self._compiled_before_first = self._last, self._compiled.seconds
        self.tokens += 1
        self.last_token = token.token
        self.text += token.text or ""
        self.finish_reason = token.finish_reason or self.finish_reason
        for part, text in self._splitter.add(token.text or ""):
            self._switch_to(part)
            self._show(text)
        self._switch_to(self._splitter.part)
        if self._part == CALLS:
            self._screen.status(f"calling: {self.tokens} tokens")

    def end(self) -> None:
        """Show what is left, at the end of the answer."""
        for _, text in self._splitter.end():
            self._show(text)
        self._switch_to("")
        self._screen.status("")

    def _show(self, text: str) -> None:
        self._last_char = text[-1]
        if self._part == ANSWER:
            self._screen.result(text)
        elif self._hide_reasoning:
            self._screen.status(f"thinking: {self.tokens} tokens (Ctrl-C stops it)")
        else:
            self._screen.aside(text)

    def _switch_to(self, part: str) -> None:
        """Finish the part shown so far, unless it goes on."""
        if part == self._part:
            return
        if self._last_char and self._part == ANSWER:
            self._screen.result("\n" * (self._last_char != "\n"))
        elif self._last_char and self._hide_reasoning:
            self._screen.note(f"(thought for {self._last - self._first:.1f} s; /think show shows it)")
        elif self._last_char:
            self._screen.aside("\n\n")
        self._part, self._last_char = part, ""

    def describe(self, used: int, capacity: int) -> str:
        """Return the speed, and how full the context is."""
        compiling = self._compiled.seconds
        seconds = self._last - self._first - (compiling - self._compiled_before_first)
        rate = f" at {(self.tokens - 1) / seconds:.1f} tokens/s" if self.tokens > 1 and seconds > 0 else ""
        compiled = f" ({compiling:.1f} s compiling)" if compiling > 0.5 else ""
        first = f"first token after {self._first - self._start:.1f} s{compiled}"
        return (
            f"{pluralize(self.tokens, 'token')}{rate}, {first}, "
            f"{pluralize(self.prompt_read, 'prompt token')} read, context {used}/{capacity}"
        )
