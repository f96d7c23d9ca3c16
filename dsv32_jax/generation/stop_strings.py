"""Stop strings, found across the borders of tokens."""

from collections.abc import Iterable, Sequence

from ..errors import UsageError


class StopStrings:
    """Cuts a stream of text before the stop string that is complete first.

    Text that may be the beginning of a stop string is held back until it is decided; how the text is cut into pieces
    changes nothing. Where several are complete at the same character, the longest counts. After a hit, `hit` is the
    stop string, and no more text is given.
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
        """The text that is now known to come before any stop string."""
        if self.hit is not None:
            return ""
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.hit = min(found)
            self._held = ""
            return text[:start]
        kept = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[kept:]
        return text[:kept]

    def end(self) -> str:
        """The text that was held back, now that none follows."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
