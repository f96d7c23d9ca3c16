"""The checkpoint's tokenizer.json: text to token ids and back, exactly, by the `tokenizers` library (extra [text])."""

import importlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..checkpoint.companions import read_tokenizer
from ..config import Config
from ..errors import CheckpointError, UsageError, listing, require, to_integer
from ..system.files import expand_path
from . import template
from .template import Mark, Sampled

PROBE = "hello  world\n\tDon't 12345 naïve 你好 こんにちは 😀 \x00\x7f" + template.USER
"""Text that must survive encoding and decoding before a tokenizer is used: some drop spaces."""

UNUSED = "\N{REPLACEMENT CHARACTER}".encode()


class Tokenizer:
    """Byte-level BPE with DeepSeek's special tokens, checked against the model's config.

    `specials` maps the text of every added token to its id.
    """

    def __init__(self, specials: dict[str, int], token_bytes: dict[int, bytes], library: Any, vocab_size: int):
        self.specials, self.vocab_size = specials, vocab_size
        self._token_bytes, self._library = token_bytes, library
        self._special_ids = frozenset(specials.values())
        longest_first = sorted(specials, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self.encode(PROBE)

    @classmethod
    def load(cls, folder: str | Path, cfg: Config) -> "Tokenizer":
        """Load the tokenizer in a checkpoint's folder, for the model that `cfg` describes.

        Raises UsageError where `tokenizers` is not installed or `cfg` is not a Config; CheckpointError where there is
        no tokenizer.json, or it is not byte-level BPE that preserves text, or it belongs to another model.
        """
        require(cfg, Config, "cfg must be a Config, as model.cfg is")
        file = expand_path(folder) / "tokenizer.json"
        stored = read_tokenizer(file.parent, cfg) if file.is_file() else None
        if stored is None:
            raise CheckpointError(
                f"no tokenizer.json in {file.parent}: copy the original checkpoint's there, or use token ids only"
            )
        try:
            library = importlib.import_module("tokenizers")
        except ImportError as error:
            raise UsageError(
                f"text needs the `tokenizers` library ({error}): pip install 'dsv32-jax[text]', or use token ids only"
            ) from error
        raw, _ = stored
        try:
            problems = [*_find_vocabulary_problems(raw, cfg), *_find_unsupported_parts(raw)]
            definition = "" if problems else json.dumps(_define_plain(raw))
            specials = {token["content"]: token["id"] for token in raw.get("added_tokens") or []}
            token_bytes = {i: _decode_letters(text) for text, i in raw["model"]["vocab"].items()}
            token_bytes |= {i: text.encode("utf-8") for text, i in specials.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{file} is not a tokenizer: {error!r}") from error
        if problems:
            raise CheckpointError(
                f"{file} is not DeepSeek-V3.2's tokenizer, or was modified: {'; '.join(problems)}. Replace it by the "
                "checkpoint's own tokenizer.json, or use token ids only"
            )
        try:
            plain = library.Tokenizer.from_str(definition)
        except Exception as error:
            raise CheckpointError(f"the `tokenizers` library cannot use {file}: {error}") from error
        return cls(specials, token_bytes, plain, cfg.vocab_size)

    def __repr__(self) -> str:
        return f"Tokenizer of {self.id_count} tokens, {len(self.specials)} of them special"

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Return the token ids of a text; no token is added. Raises UsageError for anything but a text."""
        if not isinstance(text, str):
            each = ": encode each, [tokenizer.encode(text) for text in texts]" if isinstance(text, Iterable) else ""
            raise UsageError(f"only text can be encoded, not {text!r:.60}{each}")
        return self.encode_pieces([text], allow_special=allow_special)

    def encode_pieces(self, pieces: Iterable[str], *, allow_special: bool = False) -> list[int]:
        """Return the token ids of the pieces of one text.

        A Mark, text that the message format itself writes, may hold special tokens. Anywhere else their text is plain
        text, unless `allow_special`; then the ids are those the library gives for the joined text. Sampled text has
        its own ids.
        """
        if allow_special:
            pieces = [Mark("".join(pieces))]
        parts: list[str] = []
        for piece in pieces:
            parts += map(Mark, filter(None, self._split.split(piece))) if isinstance(piece, Mark) else [piece]
        ids: list[int] = []
        for kind, run in itertools.groupby(parts, self._kind_of):
            texts = list(run)
            if kind == "plain":
                ids += self._encode_plain("".join(texts))
            else:
                each = (text.ids if isinstance(text, Sampled) else [self.specials[text]] for text in texts)
                ids += itertools.chain.from_iterable(each)
        return ids

    def _kind_of(self, part: str) -> str:
        if isinstance(part, Sampled):
            return "sampled"
        return "special" if isinstance(part, Mark) and part in self.specials else "plain"

    def _encode_plain(self, text: str) -> list[int]:
        try:
            expected = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(f"no tokens for the text: lone surrogate at character {error.start}") from None
        ids = self._library.encode(text, add_special_tokens=False).ids
        if self.bytes_of(ids) != expected or not self._special_ids.isdisjoint(ids):
            raise CheckpointError(
                "the tokenizer changes text that it encodes, or makes special tokens of plain text: it does not belong "
                "to this model. Replace it by the checkpoint's own tokenizer.json"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of tokens, special ones included; invalid UTF-8 and unused ids become U+FFFD."""
        return self.bytes_of(ids).decode("utf-8", "replace")

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """Return the joined bytes of tokens. Raises UsageError on ids outside the vocabulary."""
        return b"".join(self._token_bytes.get(i, UNUSED) for i in self.check_ids(ids, "tokens"))

    def check_ids(self, ids: Iterable[int], name: str) -> list[int]:
        """Return `ids` as ints. Raises UsageError, which calls them `name`, unless all are in the vocabulary."""
        ids = list(ids)
        if wrong := [i for i in ids if to_integer(i) not in range(self.vocab_size)]:
            raise UsageError(
                f"{len(wrong)} of {len(ids)} {name} are outside the vocabulary of 0..{self.vocab_size - 1}: "
                f"{listing(wrong, 5)}"
            )
        return [int(i) for i in ids]

    @property
    def id_count(self) -> int:
        """How many ids there are, counted up to the largest."""
        return max(self._token_bytes) + 1

    @property
    def unused(self) -> list[int]:
        """The ids that have an embedding row but no token."""
        return [i for i in range(self.vocab_size) if i not in self._token_bytes]


def _find_vocabulary_problems(raw: dict, cfg: Config) -> list[str]:
    """Return what is wrong with the tokens of a tokenizer.json and their ids."""
    base, added = raw["model"]["vocab"], raw.get("added_tokens") or []
    texts = [token["content"] for token in added]
    specials = {token["content"]: token["id"] for token in added}
    ids = {**base, **specials}
    found = {
        f"ids that are no whole number below {cfg.vocab_size}": [
            f"{i!r} ({text!r})" for text, i in ids.items() if type(i) is not int or not 0 <= i < cfg.vocab_size
        ],
        "ids of two tokens": [i for i, count in Counter(ids.values()).items() if count > 1],
        "added tokens that are empty or there twice": [
            repr(text) for text, count in Counter(texts).items() if count > 1 or not text or not isinstance(text, str)
        ],
        "added tokens that absorb spaces or match whole words only": [
            repr(token["content"]) for token in added if any(map(token.get, ("lstrip", "rstrip", "single_word")))
        ],
        "added tokens with two ids": [repr(text) for text in specials if base.get(text, ids[text]) != ids[text]],
        "bytes without a token": [f"0x{byte:02x}" for letter, byte in BYTE_LETTERS.items() if letter not in base],
        "missing special tokens": [mark for mark in template.SPECIAL if mark not in specials],
    }
    for mark, name, expected in (
        (template.BOS, "bos_token_id", (cfg.bos_token_id,)),
        (template.EOS, "eos_token_id", cfg.eos_token_id),
    ):
        if specials.get(mark, expected[0]) not in expected:
            found[f"{mark} has id {specials[mark]}, but the config's {name} is"] = list(expected)
    return [f"{problem}: {listing(items)}" for problem, items in found.items() if items]


def _find_unsupported_parts(raw: dict) -> list[str]:
    """Return the parts of a tokenizer.json that byte-level BPE does not have."""
    model, decoder, normalizer = raw["model"], raw.get("decoder") or {}, raw.get("normalizer") or {}
    supported = {
        "model type": model.get("type", "BPE") == "BPE",
        "subword prefix": not model.get("continuing_subword_prefix"),
        "word suffix": not model.get("end_of_word_suffix"),
        "decoder": decoder.get("type") == "ByteLevel",
        "normalizer": not normalizer or (normalizer.get("type") == "Sequence" and not normalizer.get("normalizers")),
        "pre_tokenizer": all(step.get("type") in ("Split", "ByteLevel") for step in _get_pre_tokenizers(raw)),
    }
    return [f"its {name} is not that of byte-level BPE" for name, good in supported.items() if not good]


def _get_pre_tokenizers(raw: dict) -> list[dict]:
    stored = raw["pre_tokenizer"]
    return stored["pretokenizers"] if stored["type"] == "Sequence" else [stored]


def _define_plain(raw: dict) -> dict:
    """Return the definition of a tokenizer for plain text, which never adds, cuts, pads or samples tokens.

    It is rebuilt from the parts that were checked, because the library aborts the process on some files.
    """
    model = {"type": "BPE", "vocab": raw["model"]["vocab"], "merges": raw["model"]["merges"]}
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _get_pre_tokenizers(raw)},
        "model": {**model, "ignore_merges": bool(raw["model"].get("ignore_merges"))},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    }


def _assign_byte_letters() -> dict[str, int]:
    """Map the letter that byte-level BPE writes for each byte: itself where visible, else the next from U+0100."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return {chr(byte if byte in visible else next(others)): byte for byte in range(0x100)}


BYTE_LETTERS = _assign_byte_letters()


def _decode_letters(token: str) -> bytes:
    """Return the bytes of a base token; one that is not written in byte letters stands for itself."""
    try:
        return bytes(BYTE_LETTERS[letter] for letter in token)
    except KeyError:
        return token.encode("utf-8")
