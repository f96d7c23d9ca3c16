"""A conversation on disk: its messages as JSON, and beside them the session, so that they need not be read again."""

import json
import os
from pathlib import Path
from typing import Any

from ..chat import Conversation
from ..errors import CheckpointError, DsvError, OutputExistsError, UsageError
from ..generation.session import OWN, Session, load_session, session
from ..system.files import expand_path

KIND = "dsv32_jax conversation 1"
FIELDS = {"system": (str, type(None)), "tools": (list,), "thinking": (bool,), "messages": (list,)}
LARGEST = 256 << 20
"""Bytes of a conversation that are read."""


def files(file: Path) -> tuple[Path, Path]:
    """Where `file` keeps messages and cache: FILE.json and FILE.safetensors."""
    stem = expand_path(file)
    if not stem.name:
        raise UsageError(f"{file} is no name of a file; nothing was written or read")
    stem = stem.with_suffix("") if stem.suffix in (".json", ".safetensors") else stem
    return stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".safetensors")


def save(file: Path, conversation: Conversation, session: Session, *, replace: bool) -> list[Path]:
    """Write both; the files. Raises OutputExistsError where one is there and not to be replaced."""
    found = files(file)
    if there := [path for path in found if path.exists() and not replace]:
        raise OutputExistsError(f"{there[0]} exists already and was not touched; save under another name")
    raw = {"kind": KIND, **{name: getattr(conversation, name) for name in FIELDS}}
    session.save(found[1])
    unfinished = found[0].with_name(found[0].name + ".unfinished")
    unfinished.write_text(json.dumps(raw, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    unfinished.chmod(found[1].stat().st_mode)
    os.replace(unfinished, found[0])
    return list(found)


def load(file: Path, current: Session) -> tuple[Conversation, Session, str]:
    """The conversation, a session like `current` for it, and, where that has to read it again, why.

    Raises CheckpointError where `file` is no conversation.
    """
    conversation, (_, cache) = conversation_in(file), files(file)
    try:
        if not cache.exists():
            raise UsageError(f"there is no {cache.name}")
        found = load_session(current.model, cache)
        if wrong := [name for name in OWN if getattr(found, name) != getattr(current, name)]:
            raise UsageError(f"{cache.name} was saved with {_settings(found, wrong)}, not {_settings(current, wrong)}")
        return conversation, found, ""
    except DsvError as error:
        own = {name: getattr(current, name) for name in OWN}
        return conversation, session(current.model, **own), str(error)


def _settings(found: Session, names: list[str]) -> str:
    return ", ".join(f"{name} {getattr(found, name)}" for name in names)


def conversation_in(file: Path) -> Conversation:
    """The conversation alone, without its session. Raises CheckpointError where `file` is none."""
    file, _ = files(file)
    raw = read_json(file)
    if not isinstance(raw, dict) or raw.get("kind") != KIND:
        raise CheckpointError(f"{file} is not a conversation of this version ({KIND})")
    wrong = [name for name, kinds in FIELDS.items() if not isinstance(raw.get(name), kinds)]
    if wrong or len(raw) != len(FIELDS) + 1:
        raise CheckpointError(f"{file} is damaged: it needs {', '.join(FIELDS)} ({', '.join(wrong) or 'and no more'})")
    try:
        return Conversation(**{name: raw[name] for name in FIELDS})
    except UsageError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def read_json(file: Path) -> Any:
    """The value in a JSON file. Raises CheckpointError where it is none."""
    file = expand_path(file)
    with open(file, "rb") as opened:
        raw = opened.read(LARGEST + 1)
    try:
        if len(raw) > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
