"""The files beside the weights that a converted checkpoint keeps: the tokenizer's, and generation_config.json.

tokenizer.json is read as plain JSON; no tokenizer is built.
"""

import json
import os
import shutil
from pathlib import Path

from ..config import Config
from ..errors import CheckpointError, listing, pluralize
from ..system.files import read_regular, replace_file

COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")

TOKENIZER = COMPANIONS[0]
LARGEST_TOKENIZER = 64 << 20


def check_tokenizer(folder: Path, cfg: Config) -> int | None:
    """Return the number of token ids, up to the largest, in the tokenizer of `folder`; None if it has none.

    Raises CheckpointError if it cannot be read, or if its ids do not fit the config.
    """
    stored = read_tokenizer(folder, cfg)
    return stored and stored[1]


def read_tokenizer(folder: Path, cfg: Config) -> tuple[dict, int] | None:
    """Return the parsed tokenizer.json of `folder` and the number that `check_tokenizer` returns."""
    file = folder / TOKENIZER
    if not file.exists():
        return None
    try:
        raw = json.loads(read_regular(file, LARGEST_TOKENIZER))
        vocab = raw["model"]["vocab"]
        ids = set(vocab.values() if isinstance(vocab, dict) else range(len(vocab)))
        ids |= {token["id"] for token in raw.get("added_tokens", [])}
        if wrong := [i for i in ids if type(i) is not int]:
            raise TypeError(f"{pluralize(len(wrong), 'id')} not a whole number: {wrong[0]!r}")
        largest = max(ids)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{file} is not a tokenizer ({reason}). Replace it, or remove it to use token ids only"
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
