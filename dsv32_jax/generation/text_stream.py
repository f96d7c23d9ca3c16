"""Text of a stream of tokens: it never has to be taken back, and ends before a stop string."""

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import UsageError


def require_tokenizer(tokenizer: Any) -> None:
    """Raise UsageError if `tokenizer` cannot give the bytes of tokens."""
    if not callable(getattr(tokenizer, "bytes_of", None)):
        raise UsageError(f"tokenizer must be a Tokenizer, as chat.Tokenizer.load returns it, not {tokenizer!r:.200}")


class Detokenizer:
    """Turns tokens into text as they come, up to a stop string. Without one, the pieces, joined, are what
    `tokenizer.decode` makes of all tokens.

    A character whose bytes are spread over several tokens is returned with its last byte. U+FFFD is returned only for
    bytes that no later token can complete.
    """

    def __init__(self, tokenizer: Any, stop: str | Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, StopStrings(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def has_stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self._stops.hit is not None

    def add(self, ids: Iterable[int]) -> str:
        """Return the text that `ids` complete. Raises UsageError for an id outside the vocabulary."""
        return self._stops.add(self._decoder.decode(self._tokenizer.bytes_of(ids)))

    def end(self) -> str:
        """Return the text that was held back, now that no more follows."""
        return self._stops.add(self._decoder.decode(b"", True)) + self._stops.end()


class StopStrings:
    """Cuts a stream of text before the stop string that is complete first.

    Text that may be the beginning of a stop string is held back until that is decided; how the text is split into
    pieces makes no difference. If several stop strings are complete at the same character, the longest counts. After a
    hit, `hit` is the stop string, and no more text is returned.
    """

    def __init__(self, stops: str | Sequence[str]):
        stops = [stops] if isinstance(stops, str) or not isinstance(stops, Iterable) else list(stops)
        wrong = [stop for stop in stops if not isinstance(stop, str) or not stop]
        if wrong:
            raise UsageError(f"a stop string must be text with at least one character, not {wrong[0]!r}")
        self._stops = stops
        self._held = ""
        self.hit: str | None = None

    def add(self, text: str) -> str:
        """Return the text that is now known to come before any stop string."""
        if self.hit is not None:
            return ""
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.hit = min(found)
            self._held = ""
            return text[:start]
        safe = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[safe:]
        return text[:safe]

    def end(self) -> str:
        """Return the text that was held back, now that no more follows."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` may be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
