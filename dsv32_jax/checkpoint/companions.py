"""The files beside the weights that a converted checkpoint keeps: the tokenizer's, and generation_config.json.

tokenizer.json is read as plain JSON; no tokenizer is built.
"""

import json
import os
import shutil
from pathlib import Path

from ..config import Config
from ..errors import CheckpointError, listing
from ..system.files import replace_file

COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")

LARGEST_FILE = 64 << 20


def check_tokenizer(folder: Path, cfg: Config) -> int | None:
    """Compare the ids of `folder`/tokenizer.json, where there is one, with the config. Raises CheckpointError.

    Returns how many ids it has, counted up to the largest; None without a tokenizer.
    """
    stored = read_tokenizer(folder, cfg)
    return stored and stored[1]


def read_tokenizer(folder: Path, cfg: Config) -> tuple[dict, int] | None:
    """Return the parsed `folder`/tokenizer.json and how many ids it has, counted up to the largest; None without one.

    Raises CheckpointError where it cannot be read or its ids do not fit the config.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    if file.stat().st_size > LARGEST_FILE:
        raise CheckpointError(f"{file} has {file.stat().st_size} bytes; no tokenizer is larger than {LARGEST_FILE}")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        vocab = raw["model"]["vocab"]
        ids = set(vocab.values() if isinstance(vocab, dict) else range(len(vocab)))
        ids |= {token["id"] for token in raw.get("added_tokens", [])}
        if wrong := [i for i in ids if type(i) is not int]:
            raise TypeError(f"{len(wrong)} ids are no whole numbers: {wrong[0]!r}")
        largest = max(ids)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is not a tokenizer ({_why(error)}). Replace it, or remove it to use token ids only"
        ) from error
    problems = []
    if largest >= cfg.vocab_size:
        problems.append(f"its largest id is {largest}, but the model has {cfg.vocab_size} rows")
    specials = {"bos_token_id": (cfg.bos_token_id,), "eos_token_id": cfg.eos_token_id}
    problems += [f"it has no {name} {i}" for name, wanted in specials.items() for i in wanted if i not in ids]
    if problems:
        raise CheckpointError(
            f"{file} does not belong to this model: {'; '.join(problems)}. Put the same checkpoint's tokenizer.json "
            "there, or remove it to use token ids only"
        )
    return raw, largest + 1


def _why(error: Exception) -> str:
    """What Python says of content that is not as expected."""
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def require_readable_companions(src: Path) -> None:
    """Raise CheckpointError if one of COMPANIONS is there but is no regular file: a dangling link, a pipe."""
    if wrong := [name for name in COMPANIONS if os.path.lexists(src / name) and not (src / name).is_file()]:
        raise CheckpointError(
            f"{src}: not regular files: {listing(wrong)} (dangling links?). Nothing was written; "
            "download them again, or remove them"
        )


def copy_companions(src: Path, dst: Path) -> list[str]:
    """Copy COMPANIONS, which the tokenizer and the chat need; return the names of those that exist."""
    found = [name for name in COMPANIONS if (src / name).is_file()]
    for name in found:
        with replace_file(dst / name) as new, open(src / name, "rb") as source, open(new, "wb") as target:
            shutil.copyfileobj(source, target)
    return found
