"""tokenizer.json, which is not trusted: read within bounds, and rebuilt from its known parts for the library."""

import importlib
import json
from pathlib import Path
from typing import Any

from ..checkpoint import vocabulary
from ..config import Config
from ..errors import CheckpointError, UsageError
from .byte_level import Vocabulary


def read(file: Path, cfg: Config) -> tuple[Vocabulary, Any]:
    """The vocabulary of a tokenizer.json, and the library's tokenizer for text in which nothing is special."""
    if not file.is_file():
        raise CheckpointError(
            f"there is no tokenizer.json in {file.parent}: copy the one of the original checkpoint there, or use "
            "token ids only"
        )
    vocabulary.check(file.parent, cfg)
    try:
        library = importlib.import_module("tokenizers")
    except ImportError as error:
        raise UsageError(
            f"text needs the `tokenizers` library ({error}): pip install 'dsv32-jax[text]', or use token ids only"
        ) from error
    try:
        with open(file, "rb") as opened:
            raw = json.loads(opened.read(vocabulary.LARGEST_FILE))
        known, problems = Vocabulary.of(raw, cfg)
        problems += [f"its {name} is none of byte-level BPE" for name in _foreign(raw)]
        definition = json.dumps(_definition(raw)) if not problems else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a tokenizer: {error!r}") from error
    if problems:
        raise CheckpointError(
            f"{file} is not the tokenizer of DeepSeek-V3.2, or was changed: {'; '.join(problems)}. Put the "
            "checkpoint's own tokenizer.json there, or use token ids only"
        )
    try:
        return known, library.Tokenizer.from_str(definition)
    except Exception as error:
        raise CheckpointError(f"the `tokenizers` library cannot use {file}: {error}") from error


def _foreign(raw: dict) -> list[str]:
    """The parts that byte-level BPE does not have, by name."""
    model, decoder, normalizer = raw["model"], raw.get("decoder") or {}, raw.get("normalizer") or {}
    known = {
        "type of model": model.get("type", "BPE") == "BPE",
        "subword prefix": not model.get("continuing_subword_prefix"),
        "word suffix": not model.get("end_of_word_suffix"),
        "decoder": decoder.get("type") == "ByteLevel",
        "normalizer": not normalizer or (normalizer.get("type") == "Sequence" and not normalizer.get("normalizers")),
        "pre_tokenizer": all(step.get("type") in ("Split", "ByteLevel") for step in _steps(raw)),
    }
    return [name for name, good in known.items() if not good]


def _steps(raw: dict) -> list[dict]:
    """How text is cut before its bytes are merged."""
    given = raw["pre_tokenizer"]
    return given["pretokenizers"] if given["type"] == "Sequence" else [given]


def _definition(raw: dict) -> dict:
    """The tokenizer of plain text: nothing that adds, cuts, pads or draws tokens.

    It is made of what was looked at, since the library ends the process on some files.
    """
    model = {"type": "BPE", "vocab": raw["model"]["vocab"], "merges": raw["model"]["merges"]}
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _steps(raw)},
        "model": {**model, "ignore_merges": bool(raw["model"].get("ignore_merges"))},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    }
