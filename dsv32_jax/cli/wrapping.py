"""Prose that comes in pieces, broken between words; what stands in a fence of ``` is left as it is."""

import unicodedata

FENCE = "```"


class Wrapping:
    """Gives text on, word by word, with line breaks where the next word would not fit in `width` columns."""

    def __init__(self, width: int):
        self._width = width
        self._column = 0
        self._word = self._line = ""
        self._fenced = False

    def add(self, text: str) -> str:
        """What can be shown now: all but an unfinished word."""
        return "".join(map(self._add, text))

    def end(self) -> str:
        """The unfinished word, now that nothing follows."""
        word, self._word = self._word, ""
        if not word:
            return ""
        columns = sum(map(columns_of, word))
        breaks = not self._fenced and 0 < self._column and self._column + columns > self._width >= columns
        self._column = columns if breaks else self._column + columns
        return "\n" + word if breaks else word

    def _add(self, char: str) -> str:
        if char == "\n":
            shown = self.end() + char
            self._fenced ^= self._line.lstrip().startswith(FENCE)
            self._column, self._line = 0, ""
            return shown
        self._line += char
        begun = self._line.lstrip()[: len(FENCE)]
        if self._fenced or FENCE.startswith(begun):
            self._column += columns_of(char)
            return char
        if char != " ":
            self._word += char
            return ""
        shown = self.end()
        self._column += 1
        return shown + char


def columns_of(char: str) -> int:
    """How many columns of a terminal a character takes."""
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
