"""Strided windows: how a text that is longer than the context is read so that each token is scored once."""

from collections.abc import Sequence
from typing import NamedTuple


class Window(NamedTuple):
    """Tokens that are read together, from position `start` of a document on.

    Scored are those from index `first` on; those before were scored by earlier windows and are context here. The
    first token of a document, which nothing precedes, is never scored.
    """

    document: int
    start: int
    tokens: list[int]
    first: int

    @property
    def predicting(self) -> slice:
        """The tokens after which the scored ones come."""
        return slice(self.first - 1, len(self.tokens) - 1)


def windows(documents: Sequence[Sequence[int]], context: int, stride: int) -> list[Window]:
    """The windows of `context` tokens (fewer at a document's end), `stride` < `context` apart.

    From a document's second window on, a token is scored with at least context - stride tokens before it.
    """
    found = []
    for document, tokens in enumerate(documents):
        start, scored = 0, 1
        while scored < len(tokens):
            part = list(tokens[start : start + context])
            found.append(Window(document, start, part, scored - start))
            scored = start + len(part)
            start += stride
    return found
