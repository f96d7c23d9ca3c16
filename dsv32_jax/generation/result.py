"""The results of a generation: tokens one by one, rows, and all of them with statistics."""

import collections
import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from ..errors import pluralize
from .text_stream import Detokenizer, StopStrings

SHOWN_ROWS = 8
"""Rows that `repr` shows."""

TopLogprobs = tuple[tuple[int, float], ...]
"""The most likely tokens at a position with their log-probabilities, as many as `top_logprobs` asks for."""


class Token(NamedTuple):
    """One token of a stream. `finish_reason` is None until the last one; `text` is the text this token completes, None
    without a tokenizer."""

    token: int
    logprob: float
    finish_reason: str | None
    text: str | None = None
    top: TopLogprobs = ()


class Row:
    """One row as it grows. `finish_reason` is "stop" after an end token or stop string, "length" where the limit is
    reached, "interrupted" where Ctrl-C came first, and None before."""

    def __init__(self, end_ids: Collection[int], limit: int, tokenizer: Any = None, stop: str | Sequence[str] = ()):
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[TopLogprobs] = []
        self.finish_reason: str | None = None if limit else "length"
        self._end_ids, self._limit = frozenset(end_ids), limit
        self._pieces: list[str] = []
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._stops = StopStrings(stop)

    @property
    def text(self) -> str | None:
        """The text so far, without end token and stop string; None without a tokenizer."""
        return None if self._detokenizer is None else "".join(self._pieces)

    def add(self, token: int, logprob: float, top: TopLogprobs = ()) -> Token:
        """Append a token and return it as a stream yields it."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.top.append(top)
        text = self._read(token)
        if token in self._end_ids or self._stops.hit is not None:
            self.finish_reason = "stop"
        elif len(self.tokens) == self._limit:
            self.finish_reason = "length"
        if self.finish_reason:
            text = self._flush(text)
        return Token(token, logprob, self.finish_reason, text, top)

    def interrupt(self) -> None:
        """End the row where it is, unless it has ended."""
        if self.finish_reason is None:
            self.finish_reason = "interrupted"
            self._flush("")

    def _read(self, token: int) -> str | None:
        if self._detokenizer is None:
            return None
        text = "" if token in self._end_ids else self._stops.add(self._detokenizer.add([token]))
        self._pieces.append(text)
        return text

    def _flush(self, text: str | None) -> str | None:
        """Return `text` and what was held back behind it."""
        if self._detokenizer is None:
            return None
        rest = self._stops.add(self._detokenizer.end()) + self._stops.end()
        self._pieces.append(rest)
        return (text or "") + rest


@dataclasses.dataclass(frozen=True)
class Stats:
    """Where the time went. Rates count real tokens of all rows and leave out compilation.

    `steps` counts the decode steps of all rows. With drafts a step generates several tokens, of which `accepted` were
    drafted. Tokens behind a stop string are counted in these two, not in `new_tokens`.
    """

    rows: int
    compile_seconds: float
    compiles: int
    prefill_seconds: float
    decode_seconds: float
    prompt_tokens: int
    new_tokens: int
    capacity: int
    steps: int
    drafts: int
    accepted: int

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens processed per second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens generated per second after the first of each row, which belongs to prefill."""
        decoded = self.new_tokens - self.rows
        return decoded / self.decode_seconds if self.decode_seconds and decoded > 0 else 0.0

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that the model accepted; 0 without drafts."""
        return self.accepted / (self.steps * self.drafts) if self.steps and self.drafts else 0.0


@dataclasses.dataclass(frozen=True, repr=False)
class Generation:
    """The result of a request: one entry a row, the n continuations of a prompt next to each other.

    tokens         the new tokens, the end token included if the model sampled one; with a stop string up to the token
                   that completes it
    logprobs       natural logarithms under the model's own distribution, before penalties, temperature and truncation
    finish_reason  "stop": an end token or stop string; "length": max_new_tokens; "interrupted": Ctrl-C, or a stream
                   that was closed
    text           without end token and stop string; None without a tokenizer
    top_logprobs   the most likely tokens at each position; None unless requested
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    finish_reason: list[str]
    stats: Stats
    text: list[str] | None = None
    top_logprobs: list[list[TopLogprobs]] | None = None

    def __repr__(self) -> str:
        stats, reasons = self.stats, collections.Counter(self.finish_reason)
        ends = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        lines = [f"Generation: {pluralize(len(self.tokens), 'row')} ({ends})"]
        for i, tokens in enumerate(self.tokens[:SHOWN_ROWS]):
            content = ", ".join(map(str, tokens)) if self.text is None else repr(self.text[i])
            short = content if len(content) <= 60 else content[:57] + "..."
            lines.append(f"  {i:<3} {pluralize(len(tokens), 'token'):>11}  {short}")
        if len(self.tokens) > SHOWN_ROWS:
            lines.append(f"  ... and {len(self.tokens) - SHOWN_ROWS} more")
        rates = f"prefill {stats.prefill_tokens_per_second:.0f}, decode {stats.decode_tokens_per_second:.0f} tokens/s"
        return "\n".join([*lines, f"  {rates}; compilation {stats.compile_seconds:.1f} s"])
