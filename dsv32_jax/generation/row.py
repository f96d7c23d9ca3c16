"""One sequence: a prompt and the tokens that follow it, and where it stands in the engine."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from .detokenizer import Detokenizer
from .request import Request
from .result import Generation, Stats, Token, TopLogprobs


class Row:
    """The tokens of one row of a request.

    finish_reason  "stop" after an end token or stop string, "length" at the limit, "interrupted" if it was stopped
                   before, and None while it goes on
    error          the error that ended it, if one did
    pending        tokens that nobody has taken yet
    order          its place in the order of all rows of the engine; slot: the row of the batch that computes it
    pages          its pages; length: the tokens in them; unsure: how many of the last ones the MTP head has not read;
                   cached: the length when it lost its place
    read           prompt tokens that were read, again after a preemption;  steps, made: decode steps, and their tokens
    constraint     which tokens may come next, None if all may;  permitted: those that its sampling permits;  allowed:
                   those that it may sample next. Both bool [V], or None where they were not found yet
    group          all rows of the request;  news: those of them that have pending tokens or have ended
    submitted      when it was;  before: the engine's totals then
    """

    def __init__(self, request: Request, index: int = 0):
        tokenizer, self.request, self.index = request.options.tokenizer, request, index
        prompt = index // request.options.n
        self.prompt, self.thoughts_end = request.prompts[prompt], request.thoughts_ends[prompt]
        self.sampling, self.limit = request.samplings[index], request.limits[index]
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[TopLogprobs] = []
        self.finish_reason: str | None = None if self.limit else "length"
        self.error: Exception | None = None
        self.pending: deque[Token] = deque()
        self.order, self.length, self.unsure, self.cached = -1, 0, 0, 0
        self.slot: int | None = None
        self.pages: list[int] = []
        self.read = self.steps = self.made = 0
        self.group, self.news, self.submitted = [self], deque[Row](), 0.0
        self.before: dict[str, float] = {}
        self.constraint = request.options.constraint and request.options.constraint()
        self.permitted: np.ndarray | None = None
        self.allowed: np.ndarray | None = None
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer, request.options.stop, self.prompt)
        self._pieces: list[str] = []

    @property
    def answered(self) -> int:
        """How many of its tokens belong to the answer."""
        end = self.thoughts_end
        thoughts = 0 if end < 0 else self.tokens.index(end) + 1 if end in self.tokens else len(self.tokens)
        return len(self.tokens) - thoughts

    @property
    def known(self) -> Sequence[int]:
        """Prompt and tokens so far."""
        return self.prompt + self.tokens if self.tokens else self.prompt

    @property
    def has_begun(self) -> bool:
        """Whether it had a place once, or wants none."""
        return self.slot is not None or self.read > 0 or self.finish_reason == "length"

    @property
    def unread(self) -> int:
        """The tokens to read before the next one is generated, without the last, which the first decode step reads."""
        return len(self.prompt) + len(self.tokens) - 1 - self.length

    @property
    def text(self) -> str | None:
        """The text so far, without end token and stop string; None without a tokenizer."""
        return None if self._detokenizer is None else "".join(self._pieces)

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended it, None if none did."""
        return self._detokenizer.hit if self._detokenizer else None

    def add(self, token: int, logprob: float, top: TopLogprobs = ()) -> Token:
        """Append a token and return it as a stream yields it."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.top.append(top)
        text, is_end = "", token in self.request.end_ids
        if self.constraint and not is_end:
            self.constraint.add(token)
            self.allowed = None
        if self._detokenizer and not is_end:
            text = self._detokenizer.add([token])
        if is_end or self.stop_string is not None:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.limit:
            self.finish_reason = "length"
        if self._detokenizer and self.finish_reason:
            text += self._detokenizer.end()
        self._pieces.append(text)
        return Token(token, logprob, self.finish_reason, text if self._detokenizer else None, top)

    def report(self) -> None:
        """Tell the request how many tokens of its prompts were read."""
        if self.request.options.progress is not None:
            total = sum(map(len, self.request.prompts))
            self.request.options.progress(min(sum(row.read for row in self.group), total), total)

    def interrupt(self, error: Exception | None = None) -> None:
        """End the row where it is, unless it has ended. Tokens that nobody has taken are dropped."""
        self.news.append(self)
        if self.pending:
            taken = len(self.tokens) - len(self.pending)
            self.pending.clear()
            for kept in (self.tokens, self.logprobs, self.top, self._pieces):
                del kept[taken:]
            self.finish_reason, self.error = "interrupted", error
        elif self.finish_reason is None:
            self.finish_reason, self.error = "interrupted", error
            self._pieces.append(self._detokenizer.end() if self._detokenizer else "")


def summarize(rows: Sequence[Row], totals: dict[str, float]) -> Generation:
    """Return what was generated in the rows of a request. Rows that have not ended are interrupted."""
    for row in rows:
        row.interrupt()
    request, before = rows[0].request, rows[0].before
    names = ("compiles", "loads", "compile_seconds", "prefill_seconds", "decode_seconds")
    stats: dict[str, Any] = {name: totals[name] - before[name] for name in names}
    return Generation(
        [row.tokens for row in rows],
        [row.logprobs for row in rows],
        [str(row.finish_reason) for row in rows],
        Stats(
            rows=len(rows),
            prompt_tokens=sum(row.read for row in rows),
            new_tokens=sum(len(row.tokens) for row in rows),
            capacity=request.capacity,
            steps=sum(row.steps for row in rows),
            drafts=request.options.draft,
            accepted=sum(row.made - row.steps for row in rows),
            **stats,
        ),
        None if request.options.tokenizer is None else [str(row.text) for row in rows],
        [row.top for row in rows] if request.options.top_logprobs else None,
    )
