"""An answer while it is written: which of its text is reasoning, which is for the reader, and which calls tools."""

from collections.abc import Iterator

from ..chat import StopStrings, template

THINKING, ANSWER, CALLS = "thinking", "answer", "calls"

OPENS_CALLS = ("\n\n<" + template.DSML, "<" + template.DSML)


class Parts:
    """Takes an answer as it comes. Text that may be the beginning of a tag is held back until that is decided."""

    def __init__(self, *, thinking: bool):
        self.part = THINKING if thinking else ANSWER
        self._stops = StopStrings(template.THINK_END if thinking else OPENS_CALLS)

    def add(self, text: str) -> Iterator[tuple[str, str]]:
        """What is now known to belong to a part: (part, text). Tags are left out, and nothing is said of calls."""
        for char in text:
            if self.part == CALLS:
                continue
            if piece := self._stops.add(char):
                yield self.part, piece
            if self._stops.hit is not None:
                self.part, self._stops = (ANSWER if self.part == THINKING else CALLS), StopStrings(OPENS_CALLS)

    def end(self) -> Iterator[tuple[str, str]]:
        """What was held back, now that nothing follows."""
        if piece := self._stops.end():
            yield self.part, piece
