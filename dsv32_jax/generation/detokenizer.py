"""From tokens as they come to text that never has to be taken back."""

import codecs
from collections.abc import Iterable
from typing import Any, Protocol

from ..errors import UsageError


class Tokenizer(Protocol):
    """As much of `chat.Tokenizer` as text needs."""

    def bytes_of(self, ids: Iterable[int]) -> bytes: ...


def require_tokenizer(tokenizer: Any) -> None:
    """Raise UsageError unless `tokenizer` has the methods of `chat.Tokenizer`."""
    if not callable(getattr(tokenizer, "bytes_of", None)):
        raise UsageError(f"tokenizer must be one of chat.Tokenizer.load, or have its methods, not {tokenizer!r:.200}")


class Detokenizer:
    """Text of a stream of tokens; what it gives, joined, is what `Tokenizer.decode` makes of all the tokens at once.

    A character whose bytes are spread over tokens is given when its last byte is there. U+FFFD is given only for bytes
    that no later token can make a character of.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete. Raises UsageError on an id outside the vocabulary."""
        return self._decoder.decode(self._tokenizer.bytes_of(ids))

    def end(self) -> str:
        """What an unfinished character at the end becomes."""
        return self._decoder.decode(b"", True)
