"""Byte-level BPE's vocabulary: which bytes each token id stands for."""

import itertools
from collections import Counter
from typing import NamedTuple

from ..config import Config
from ..errors import listing
from . import template

FLAGS = ("lstrip", "rstrip", "single_word")
"""What an added token may ask for that would change the text around it."""


class Vocabulary(NamedTuple):
    """Ids of the added tokens by their text, and the bytes that each id stands for."""

    specials: dict[str, int]
    said: dict[int, bytes]

    @classmethod
    def of(cls, raw: dict, cfg: Config) -> "tuple[Vocabulary, list[str]]":
        """The vocabulary in a parsed tokenizer.json, and everything that keeps it from being used."""
        base, added = raw["model"]["vocab"], raw.get("added_tokens") or []
        specials = {token["content"]: token["id"] for token in added}
        ids = {**base, **specials}
        problems = _misplaced(ids, cfg.vocab_size)
        if len(specials) < len(added) or not all(isinstance(text, str) and text for text in specials):
            problems.append("added tokens are empty or there twice")
        if moved := [token["content"] for token in added if any(token.get(flag) for flag in FLAGS)]:
            problems.append(f"{listing(map(repr, moved))} would take spaces along or need a word of their own")
        if clashing := [text for text in specials if base.get(text, ids[text]) != ids[text]]:
            problems.append(f"{listing(map(repr, clashing))} have two ids")
        if missing := [byte for letter, byte in LETTERS.items() if letter not in base]:
            problems.append(f"{len(missing)} bytes have no token")
        problems += _strangers(specials, cfg)
        said = {i: _bytes(text) for text, i in base.items()}
        return cls(specials, said | {i: text.encode("utf-8") for text, i in specials.items()}), problems


def _misplaced(ids: dict[str, int], size: int) -> list[str]:
    """What is wrong with the ids of tokens."""
    problems = []
    if wrong := [text for text, i in ids.items() if type(i) is not int or not 0 <= i < size]:
        problems.append(f"{len(wrong)} tokens have no whole number below {size} as id: {listing(map(repr, wrong))}")
    if twice := [i for i, count in Counter(ids.values()).items() if count > 1]:
        problems.append(f"{len(twice)} ids belong to two tokens: {listing(twice)}")
    return problems


def _strangers(specials: dict[str, int], cfg: Config) -> list[str]:
    """What differs from the special tokens of the format and of the config."""
    problems = [f"it has no token {mark}" for mark in template.SPECIAL if mark not in specials]
    for mark, name, wanted in (
        (template.BOS, "bos_token_id", (cfg.bos_token_id,)),
        (template.EOS, "eos_token_id", cfg.eos_token_id),
    ):
        if specials.get(mark, wanted[0]) not in wanted:
            problems.append(f"{mark} has the id {specials[mark]}, but the config's {name} is {listing(wanted)}")
    return problems


def _letters() -> dict[str, int]:
    """The letter that byte-level BPE writes for each byte: itself where it is visible, else the next from U+0100."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return {chr(byte if byte in visible else next(others)): byte for byte in range(0x100)}


LETTERS = _letters()


def _bytes(token: str) -> bytes:
    """The bytes that a token of the base vocabulary stands for; one that is not in byte letters stands for itself."""
    try:
        return bytes(LETTERS[letter] for letter in token)
    except KeyError:
        return token.encode("utf-8")
