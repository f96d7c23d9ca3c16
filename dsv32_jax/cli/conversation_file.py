"""A saved conversation: FILE.json with its messages, and FILE.safetensors with the session that has read them."""

import json
from pathlib import Path

from ..chat import Conversation
from ..errors import CheckpointError, DsvError, OutputExistsError, UsageError
from ..generation.request import CACHE_OPTIONS
from ..generation.session import Session, load_session, session
from ..system.files import expand_path, read_json, write_file

KIND = "dsv32_jax conversation 1"
FIELDS = {"system": (str, type(None)), "tools": (list,), "thinking": (bool,), "messages": (list,)}
MAX_BYTES = 256 << 20


def name_files(file: Path) -> tuple[Path, Path]:
    """Return FILE.json and FILE.safetensors of `file`, which may have either suffix or none."""
    stem = expand_path(file)
    if not stem.name:
        raise UsageError(f"{file} is not the name of a file")
    stem = stem.with_suffix("") if stem.suffix in (".json", ".safetensors") else stem
    return stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".safetensors")


def save(file: Path, conversation: Conversation, session: Session, *, replace: bool) -> list[Path]:
    """Write both files and return their paths. Raises OutputExistsError where one exists, unless `replace`."""
    messages, cache = name_files(file)
    if existing := [path for path in (messages, cache) if path.exists() and not replace]:
        raise OutputExistsError(f"{existing[0]} exists already and was not touched; save under another name")
    raw = {"kind": KIND, **{name: getattr(conversation, name) for name in FIELDS}}
    session.save(cache)
    write_file(messages, (json.dumps(raw, ensure_ascii=False, indent=1) + "\n").encode())
    messages.chmod(cache.stat().st_mode)
    return [messages, cache]


def load(file: Path, current: Session) -> tuple[Conversation, Session, str]:
    """Return the conversation and its session. Where that one does not suit the model and settings of `current`, return
    a new session like `current`, and the reason.

    Raises CheckpointError where `file` is not a conversation.
    """
    conversation, (_, cache) = load_conversation(file), name_files(file)
    own = {name: getattr(current, name) for name in CACHE_OPTIONS}
    try:
        if not cache.exists():
            raise UsageError(f"there is no {cache.name}")
        loaded = load_session(current.model, cache)
        if differing := [name for name, value in own.items() if getattr(loaded, name) != value]:
            was, now = (", ".join(f"{name} {getattr(each, name)}" for name in differing) for each in (loaded, current))
            raise UsageError(f"{cache.name} was saved with {was}, not {now}")
        return conversation, loaded, ""
    except DsvError as error:
        return conversation, session(current.model, **own), str(error)


def load_conversation(file: Path) -> Conversation:
    """Return the conversation without its session. Raises CheckpointError where `file` is none."""
    file, _ = name_files(file)
    raw = read_json(file, MAX_BYTES)
    if not isinstance(raw, dict) or raw.get("kind") != KIND:
        raise CheckpointError(f"{file} is not a conversation of this version ({KIND})")
    wrong = [name for name, kinds in FIELDS.items() if name not in raw or not isinstance(raw[name], kinds)]
    wrong += [name for name in raw if name not in FIELDS and name != "kind"]
    if wrong:
        raise CheckpointError(f"{file} is damaged: missing, unknown or of another type: {', '.join(wrong)}")
    try:
        return Conversation(**{name: raw[name] for name in FIELDS})
    except UsageError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
