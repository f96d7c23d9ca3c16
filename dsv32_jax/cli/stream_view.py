"""One answer while it comes: reasoning dimmed or hidden, text as it is, calls announced, and how fast it was."""

import time

from ..generation.transcript import Token
from ..system.compilation import Compilations
from .answer_parts import ANSWER, CALLS, THINKING, Parts
from .screen import Screen, shown
from .wrapping import Wrapping


class Answer:
    """One answer while it comes, on the screen and as text, with what there is to tell about it."""

    def __init__(self, screen: Screen, meter: Compilations, *, thinking: bool, hides: bool):
        self._screen, self._meter, self._hides = screen, meter, hides
        self._parts = Parts(thinking=thinking)
        self._part = THINKING if thinking else ANSWER
        self._start = self._first = self._last = time.perf_counter()
        self._compiled = 0.0
        self._wrapping, self._ending = Wrapping(screen.width), ""
        self.text, self.tokens, self.read = "", 0, 0
        self.last_token, self.finish_reason = -1, "interrupted"

    def reading(self, read: int) -> None:
        """So many tokens of the prompt were read."""
        self.read = read
        self._screen.status(f"reading: {read} tokens")

    def add(self, token: Token) -> None:
        """Show one more token."""
        self._last = time.perf_counter()
        if not self.tokens:
            self._first, self._compiled = self._last, self._meter.seconds
        self.tokens += 1
        self.last_token = token.token
        self.text += token.text or ""
        self.finish_reason = token.finish_reason or self.finish_reason
        self._show(token.text or "")

    def end(self) -> None:
        """Nothing more comes."""
        for part, text in self._parts.end():
            self._piece(part, text)
        self._close()
        self._screen.status("")

    def _show(self, text: str) -> None:
        for part, piece in self._parts.add(text):
            if part != self._part:
                self._close()
            self._piece(part, piece)
        if self._parts.part != self._part:
            self._close()
        if self._part == CALLS:
            self._screen.status(f"calling: {self.tokens} tokens")

    def _piece(self, part: str, text: str) -> None:
        self._ending = text[-1]
        if part == ANSWER:
            self._screen.result(self._wrapping.add(self._screen.fit(text)))
        elif self._hides:
            self._screen.status(f"thinking: {self.tokens} tokens (Ctrl-C stops it)")
        else:
            self._screen.alongside(self._wrapping.add(shown(text)))

    def _close(self) -> None:
        """Leave the part that was shown until now."""
        rest = self._wrapping.end()
        if self._part == ANSWER and self._ending:
            self._screen.result(rest + "\n" * (self._ending != "\n"))
        elif self._part == THINKING and self._ending and self._hides:
            self._screen.note(f"(thought for {self._last - self._first:.1f} s; /think show shows it)")
        elif self._part == THINKING and self._ending:
            self._screen.alongside(rest + "\n\n")
        self._part, self._wrapping, self._ending = self._parts.part, Wrapping(self._screen.width), ""

    def facts(self, used: int, capacity: int) -> str:
        """Speed, and how full the context is."""
        compiling = self._meter.seconds
        seconds = self._last - self._first - (compiling - self._compiled)
        rate = f", {(self.tokens - 1) / seconds:.1f}/s" if self.tokens > 1 and seconds > 0 else ""
        compiled = f" ({compiling:.1f} compiling)" if compiling > 0.5 else ""
        first = f"first in {self._first - self._start:.1f} s{compiled}"
        return f"{self.tokens} tokens{rate}, {first}, read {self.read}, context {used}/{capacity}"
