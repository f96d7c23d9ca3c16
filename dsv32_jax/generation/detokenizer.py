"""Text of a stream of tokens: it never has to be taken back, and ends before a stop string.

After a chat prompt a completion has parts: thoughts, the answer, tool calls. Stop strings count in the answer.
"""

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import UsageError

THINK, THINK_END = "<think>", "</think>"
CALLS_START = ("\n\n<｜DSML｜", "<｜DSML｜")
"""The tags that the format of messages puts before thoughts, before the answer, and before tool calls."""


def require_tokenizer(tokenizer: Any) -> None:
    """Raise UsageError if `tokenizer` cannot give the bytes of tokens."""
    if not callable(getattr(tokenizer, "bytes_of", None)):
        raise UsageError(f"tokenizer must be a Tokenizer, as chat.Tokenizer.load returns it, not {tokenizer!r:.200}")


def read_tag(tokenizer: Any, prompt: Sequence[int]) -> str:
    """Return THINK or THINK_END where a chat prompt ends with it, otherwise nothing."""
    last = tokenizer.bytes_of(prompt[-1:]).decode("utf-8", "replace") if prompt else ""
    return last if last in (THINK, THINK_END) else ""


class Detokenizer:
    """Turns tokens into text as they come, up to a stop string. Without one, the pieces, joined, are what
    `tokenizer.decode` makes of all tokens.

    A character whose bytes are spread over several tokens is returned with its last byte. U+FFFD is returned only for
    bytes that no later token can complete. After a chat prompt, whose last token in `prompt` opens or ends thoughts, a
    stop string counts from the end of the thoughts to the first tool call.
    """

    def __init__(self, tokenizer: Any, stop: str | Sequence[str] = (), prompt: Sequence[int] = ()):
        self._tokenizer, self._stops, self._following = tokenizer, StopStrings(stop), []
        self._given = self._stops.stops
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        if stop and (tag := read_tag(tokenizer, prompt)):
            thoughts = [] if tag == THINK_END else [StopStrings(THINK_END)]
            answer = StopStrings([*self._given, *CALLS_START])
            self._stops, *self._following = [*thoughts, answer, StopStrings(())]

    @property
    def hit(self) -> str | None:
        """The stop string that is complete, if one is."""
        return self._stops.hit

    def add(self, ids: Iterable[int]) -> str:
        """Return the text that `ids` complete. Raises UsageError for an id outside the vocabulary."""
        return self._release(self._decoder.decode(self._tokenizer.bytes_of(ids)))

    def _release(self, text: str) -> str:
        """Return the text before the stop string. A tag that ends a part of the completion belongs to the next one."""
        done = self._stops.add(text)
        hit, is_thinking = self._stops.hit, len(self._following) == 2
        if hit is not None and (is_thinking or (self._following and hit in CALLS_START and hit not in self._given)):
            text = hit + self._stops.rest
            self._stops = self._following.pop(0)
            done += self._release(text)
        return done

    def end(self) -> str:
        """Return the text that was held back, now that no more follows."""
        return self._release(self._decoder.decode(b"", True)) + self._stops.end()


class StopStrings:
    """Cuts a stream of text before the stop string that is complete first.

    Text that may be the beginning of a stop string is held back until that is decided; how the text is split into
    pieces makes no difference. If several stop strings are complete at the same character, the longest counts. After a
    hit, `hit` is the stop string, `rest` the text behind it, and no more text is returned.
    """

    def __init__(self, stops: str | Sequence[str]):
        stops = [stops] if isinstance(stops, str) or not isinstance(stops, Iterable) else list(stops)
        wrong = [stop for stop in stops if not isinstance(stop, str) or not stop]
        if wrong:
            raise UsageError(f"a stop string must be text with at least one character, not {wrong[0]!r}")
        self.stops = stops
        self._held = self.rest = ""
        self.hit: str | None = None

    def add(self, text: str) -> str:
        """Return the text that is now known to come before any stop string."""
        if self.hit is not None:
            return ""
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self.stops if (start := text.find(stop)) >= 0]
        if found:
            end, start, self.hit = min(found)
            self._held, self.rest = "", text[end:]
            return text[:start]
        safe = len(text) - max((_overlap(text, stop) for stop in self.stops), default=0)
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
