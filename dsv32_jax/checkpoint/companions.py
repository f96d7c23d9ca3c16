"""The files beside the weights that a converted checkpoint keeps: the tokenizer's, and generation_config.json.

tokenizer.json is read as plain JSON; no tokenizer is built.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import Config
from ..config.keys import is_neutral
from ..errors import CheckpointError, StorageError, listing, pluralize
from ..system.files import JsonLimits, read_json, read_regular, write_file

TOKENIZER, TOKENIZER_CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
COMPANIONS = (TOKENIZER, TOKENIZER_CONFIG, GENERATION)

LARGEST, LIMITS = 64 << 20, JsonLimits(objects=200_000, lists=1_000_000, commas=4_000_000)
"""Size limits of each of them. DeepSeek's tokenizer.json has 8 MB and 128,000 merges."""

DRAWING = ("temperature", "top_k", "top_p", "min_p")
SAMPLING = (*DRAWING, "repetition_penalty")
"""Keys of generation_config.json that a sampler here has; the first ones count unless `do_sample` is false."""

NOT_SAMPLING = {"bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "transformers_version"}


def read_settings(folder: Path, name: str) -> dict[str, Any]:
    """Return the object in the JSON file `name` of `folder`, empty if there is none. Raises CheckpointError."""
    file = folder / name
    if not os.path.lexists(file):
        return {}
    kind = "tokenizer" if name == TOKENIZER else name.removesuffix(".json")
    try:
        raw = read_json(file, LARGEST, LIMITS)
        if isinstance(raw, dict):
            return raw
        reason = f"{file} is not a {kind}, but a {type(raw).__name__}"
    except FileNotFoundError:
        reason = f"{file} is a dangling link"
    except OSError as error:
        raise StorageError(f"{file} cannot be read: {error.strerror}") from error
    except CheckpointError as error:
        reason = str(error).replace(f"{file}: ", f"{file} is not a {kind}: ")
    remove = "remove it to use token ids only" if name == TOKENIZER else "remove it"
    raise CheckpointError(f"{reason}. Replace it by the checkpoint's own file, or {remove}")


def read_end_tokens(folder: Path) -> list[int]:
    """Return the end tokens of generation_config.json. Raises CheckpointError."""
    found = read_settings(folder, GENERATION).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if wrong := [token for token in ids if type(token) is not int or token < 0]:
        raise CheckpointError(f"{folder / GENERATION}: eos_token_id holds {wrong[0]!r:.60}, which is no token id")
    return ids


def read_sampling(folder: Path) -> dict[str, Any]:
    """Return the parameters of a `Sampling` that generation_config.json asks for, unchecked. Raises CheckpointError.

    Without `do_sample` it is the parameters that count, as in vLLM; transformers would be greedy.
    """
    stored = read_settings(folder, GENERATION)
    names = SAMPLING if stored.get("do_sample") is not False else SAMPLING[len(DRAWING) :]
    found = {name: stored[name] for name in names if stored.get(name) is not None}
    if found.get("top_k") == -1:
        found["top_k"] = 0
    return {"temperature": 1.0, **found} if stored.get("do_sample") or found.keys() & set(DRAWING) else found


def compare_settings(folder: Path, cfg: Config) -> Iterator[str]:
    """Yield a note for everything in generation_config.json and tokenizer_config.json that is not followed."""
    generation, tokenizer = (read_settings(folder, name) for name in (GENERATION, TOKENIZER_CONFIG))
    unused = sorted(
        f"{key}={value!r:.40}"
        for key, value in generation.items()
        if key not in NOT_SAMPLING and key not in SAMPLING and key[:1] != "_" and not is_neutral(key, value)
    )
    if unused:
        yield f"{GENERATION}: not used: {listing(unused)}"
    if (bos := generation.get("bos_token_id")) not in (None, cfg.bos_token_id):
        yield f"{GENERATION}: bos_token_id is {bos!r:.40}, but config.json says {cfg.bos_token_id}, which counts"
    added = (read_tokenizer(folder, cfg) or ({}, 0))[0].get("added_tokens") or []
    ids = {str(token.get("content")): token["id"] for token in added}
    for key, name, expected in (
        ("bos_token", "bos_token_id", (cfg.bos_token_id,)),
        ("eos_token", "eos_token_id", cfg.eos_token_id),
    ):
        text = tokenizer.get(key)
        text = text.get("content") if isinstance(text, dict) else text
        if isinstance(text, str) and ids.get(text, expected[0]) not in expected:
            yield f"{TOKENIZER_CONFIG}: {key} {text!r:.60} has the id {ids[text]}, but {name} is {listing(expected)}"
    for key, wanted in (("add_bos_token", True), ("add_eos_token", False)):
        if tokenizer.get(key, wanted) is not wanted:
            yield f"{TOKENIZER_CONFIG}: not used: {key}={tokenizer[key]!r:.40}"


def check_tokenizer(folder: Path, cfg: Config) -> int | None:
    """Return the number of token ids, up to the largest, in the tokenizer of `folder`; None if it has none.

    Raises CheckpointError if it cannot be read, or if its ids do not fit the config.
    """
    stored = read_tokenizer(folder, cfg)
    return stored and stored[1]


def read_tokenizer(folder: Path, cfg: Config) -> tuple[dict, int] | None:
    """Return the parsed tokenizer.json of `folder` and the number that `check_tokenizer` returns."""
    file = folder / TOKENIZER
    if not os.path.lexists(file):
        return None
    try:
        raw = read_settings(folder, TOKENIZER)
        vocab = raw["model"]["vocab"]
        ids = set(vocab.values() if isinstance(vocab, dict) else range(len(vocab)))
        ids |= {token["id"] for token in raw.get("added_tokens", [])}
        if wrong := [i for i in ids if type(i) is not int]:
            raise TypeError(f"{pluralize(len(wrong), 'id')} not a whole number: {wrong[0]!r}")
        largest = max(ids)
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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


def copy_companions(src: Path, dst: Path) -> list[str]:
    """Copy COMPANIONS, which the tokenizer and the chat need; return the names of those that exist."""
    found = [name for name in COMPANIONS if (src / name).is_file()]
    for name in found:
        write_file(dst / name, read_regular(src / name, LARGEST))
    return found
