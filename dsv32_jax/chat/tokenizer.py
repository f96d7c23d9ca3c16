"""The checkpoint's tokenizer.json: text to token ids and back, exactly, by the `tokenizers` library (extra [text])."""

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import CheckpointError, UsageError, listing, require
from ..system.paths import path_of
from . import template
from .byte_level import Vocabulary
from .template import Mark
from .tokenizer_file import read

PROBE = "hello  world\n\tDon't 12345 naïve 你好 こんにちは 😀 \x00\x7f" + template.USER
"""What a tokenizer must bring back unchanged before it is used: some drop spaces."""

UNUSED = "\N{REPLACEMENT CHARACTER}".encode()
"""What an id that no token has is decoded to."""


def require_tokenizer(tokenizer: Any) -> None:
    """Raise UsageError where `tokenizer` has not the methods of a Tokenizer."""
    if not callable(getattr(tokenizer, "bytes_of", None)):
        raise UsageError(
            f"tokenizer must be what chat.Tokenizer.load gives, or have its methods, not {tokenizer!r:.200}"
        )


class Tokenizer:
    """Byte-level BPE with DeepSeek's special tokens, whose ids were compared with the model's config.

    `specials` has the id of every token that is added to the base vocabulary, by its text.
    """

    def __init__(self, vocabulary: Vocabulary, plain: Any, vocab_size: int):
        self.specials = vocabulary.specials
        self.vocab_size = vocab_size
        self._said = vocabulary.said
        self._special_ids = frozenset(self.specials.values())
        self._plain = plain
        longest_first = sorted(self.specials, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self.encode(PROBE)

    @classmethod
    def load(cls, folder: str | Path, cfg: Config) -> "Tokenizer":
        """The tokenizer in a checkpoint's folder, for the model that `cfg` describes.

        Raises UsageError where `tokenizers` is not installed or `cfg` is none; CheckpointError where there is no
        tokenizer.json, where it is not a byte-level BPE that brings text back unchanged, or belongs to another model.
        """
        require(cfg, Config, "cfg must be a Config, as model.cfg is")
        vocabulary, plain = read(path_of(folder) / "tokenizer.json", cfg)
        return cls(vocabulary, plain, cfg.vocab_size)

    def encode(self, text: str | Iterable[str], *, allow_special: bool = False) -> list[int]:
        """The token ids of a text, or of the pieces of one; no token is added.

        Special tokens count in a Mark, which is what the message format itself writes. Anywhere else their text is
        plain text, unless `allow_special`; then the ids are those of the joined text as the library gives them.
        """
        pieces: list[str] = list(text) if isinstance(text, Iterable) and not isinstance(text, str) else [text]
        if wrong := [piece for piece in pieces if not isinstance(piece, str)]:
            raise UsageError(f"only text can be encoded, not {wrong[0]!r}")
        if allow_special:
            pieces = [Mark("".join(pieces))]
        ids: list[int] = []
        for special, run in itertools.groupby(self._parts(pieces), self._is_special):
            parts = list(run)
            ids += [self.specials[part] for part in parts] if special else self._plainly("".join(parts))
        return ids

    def _is_special(self, part: str) -> bool:
        return isinstance(part, Mark) and part in self.specials

    def _parts(self, pieces: list[str]) -> Iterable[str]:
        """The pieces, those of the format cut at special tokens."""
        for piece in pieces:
            if isinstance(piece, Mark):
                yield from (Mark(part) for part in self._split.split(piece) if part)
            else:
                yield piece

    def _plainly(self, text: str) -> list[int]:
        """The ids of a text in which nothing is special, checked: they say the text, and only the text."""
        try:
            wanted = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the text has half a surrogate pair at character {error.start}, which no tokens can say"
            ) from None
        ids = self._plain.encode(text, add_special_tokens=False).ids
        if self.bytes_of(ids) != wanted or not self._special_ids.isdisjoint(ids):
            raise CheckpointError(
                "the tokenizer changes text that it encodes, or makes special tokens of plain text; it cannot be the "
                "tokenizer of this model. Put the checkpoint's own tokenizer.json there"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens, special ones included; U+FFFD stands for bytes that are no UTF-8 and for unused ids."""
        return self.bytes_of(ids).decode("utf-8", "replace")

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """The bytes of tokens, joined. Raises UsageError on ids outside the vocabulary."""
        return b"".join(self._said.get(i, UNUSED) for i in self.checked(ids, "tokens"))

    def checked(self, ids: Iterable[int], name: str) -> list[int]:
        """`ids`, all of which are token ids. Raises UsageError that calls them `name`."""
        ids = list(ids)
        wrong = [i for i in ids if isinstance(i, bool) or not hasattr(i, "__index__") or not 0 <= i < self.vocab_size]
        if wrong:
            raise UsageError(
                f"{len(wrong)} of {len(ids)} {name} are not ids of the vocabulary of 0..{self.vocab_size - 1}: "
                f"{listing(wrong, 5)}"
            )
        return [int(i) for i in ids]

    @property
    def unused(self) -> list[int]:
        """The ids that the model has a row for and that no token has."""
        return [i for i in range(self.vocab_size) if i not in self._said]
