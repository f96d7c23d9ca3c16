"""The results of a generation: tokens one by one, all rows, and statistics."""

import collections
import dataclasses
from typing import NamedTuple

from ..errors import pluralize
from ..system.summary import Summarized

SHOWN_ROWS, SHOWN_CHARACTERS = 8, 60
"""The rows that `repr` shows, and how much of each."""

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


@dataclasses.dataclass(frozen=True)
class Stats:
    """Where the time went. Rates count real tokens of all rows and leave out compilation; `loads` of the programs it
    made were read from the cache.

    `steps` counts the decode steps of all rows. With drafts a step generates several tokens, of which `accepted` were
    drafted. Tokens after a stop string are counted in these two, not in `new_tokens`.
    """

    rows: int
    compile_seconds: float
    compiles: int
    loads: int
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
        """Tokens generated per second."""
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that the model accepted; 0 without drafts."""
        return self.accepted / (self.steps * self.drafts) if self.steps and self.drafts else 0.0


@dataclasses.dataclass(frozen=True, repr=False)
class Generation(Summarized):
    """The result of a request: one entry a row, the n continuations of a prompt next to each other.

    tokens         the new tokens, including the end token if the model sampled one; with a stop string, up to the token
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

    def summary(self) -> tuple[str, dict[str, str]]:
        """Return the beginnings of the first rows, how rows ended, and rates."""
        stats, reasons = self.stats, collections.Counter(self.finish_reason)
        values = {f"row {i}": self._shorten(i) for i in range(min(len(self.tokens), SHOWN_ROWS))}
        values["finished"] = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        values["prefill"] = f"{stats.prompt_tokens} tokens at {stats.prefill_tokens_per_second:.0f} tokens/s"
        values["decode"] = f"{stats.new_tokens} tokens at {stats.decode_tokens_per_second:.0f} tokens/s"
        values["compilation"] = f"{stats.compile_seconds:.1f} s"
        return f"Generation of {pluralize(len(self.tokens), 'row')}", values

    def _shorten(self, row: int) -> str:
        text = str(self.tokens[row]) if self.text is None else repr(self.text[row])
        short = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
        return f"{pluralize(len(self.tokens[row]), 'token')}: {short}"
