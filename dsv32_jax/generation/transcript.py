"""One row of a generation as its reader sees it: tokens, their text, and why it ended."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from ..errors import UsageError
from .detokenizer import Detokenizer, require_tokenizer
from .stop_strings import StopStrings


class Token(NamedTuple):
    """One token of a stream; `finish_reason` is None until the last.

    `text` is what became readable with this token, None without a tokenizer. `top` holds the likeliest tokens here with
    their log-probabilities, as many as `top_logprobs` asked for.
    """

    token: int
    logprob: float
    finish_reason: str | None
    text: str | None = None
    top: tuple[tuple[int, float], ...] = ()


class Transcript:
    """What was made of a row so far. `finish_reason` is "stop" for an end token or stop string, "length" where
    max_new_tokens was reached, "interrupted" where Ctrl-C came first, and None before."""

    def __init__(self, ends: Collection[int], limit: int, tokenizer: Any, stop: str | Sequence[str]):
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[tuple[tuple[int, float], ...]] = []
        self.finish_reason: str | None = None if limit else "length"
        self._pieces: list[str] = []
        self._ends, self._limit = frozenset(ends), limit
        self._stops = StopStrings(stop)
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        if tokenizer is not None:
            require_tokenizer(tokenizer)
        if stop and tokenizer is None:
            raise UsageError("stop strings are found in text: give the tokenizer too (or use stop_token_ids)")

    @property
    def text(self) -> str | None:
        """The text so far, without the end token and the stop string; None without a tokenizer."""
        return None if self._detokenizer is None else "".join(self._pieces)

    def add(self, token: int, logprob: float, top: tuple[tuple[int, float], ...]) -> Token:
        """Take one more token."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.top.append(top)
        text = self._read(token)
        if token in self._ends or self._stops.hit is not None:
            self.finish_reason = "stop"
        elif len(self.tokens) == self._limit:
            self.finish_reason = "length"
        if self.finish_reason:
            text = self._rest(text)
        return Token(token, logprob, self.finish_reason, text, top)

    def interrupt(self) -> None:
        """No more tokens will come."""
        self.finish_reason = "interrupted"
        self._rest("")

    def _read(self, token: int) -> str | None:
        if self._detokenizer is None:
            return None
        text = "" if token in self._ends else self._stops.add(self._detokenizer.add([token]))
        self._pieces.append(text)
        return text

    def _rest(self, text: str | None) -> str | None:
        """`text` and what was held back behind it."""
        if self._detokenizer is None:
            return None
        rest = self._stops.add(self._detokenizer.end()) + self._stops.end()
        self._pieces.append(rest)
        return (text or "") + rest
