"""What a converted checkpoint says about itself: DST/manifest.json, written last.

A folder with a manifest is complete; one without is unfinished or something else. Nothing here needs JAX or NumPy.
"""

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, Self

from . import passport
from .errors import CheckpointError, listing
from .passport import Passport

FILE = "manifest.json"
JOURNAL = "journal.jsonl"
"""What a conversion in progress has done so far (`convert` writes it and removes it when the manifest stands)."""
FORMAT_VERSION = 1

COMPONENTS = {
    "dense": {"values"},
    "nvfp4": {"codes", "block_scale", "tensor_scale"},
    "fp8_block": {"values", "block_scale"},
}
"""The arrays each storage format keeps for one leaf; all of them have the leaf's rank."""


@dataclasses.dataclass(frozen=True)
class ArrayEntry:
    """One stored array: NumPy dtype name, shape, and the SHA-256 of its bytes in C order."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclasses.dataclass(frozen=True)
class LeafEntry:
    """One leaf of the model: its format and arrays, or (`same_as`) the leaf whose arrays it shares.

    `passport` tells where it came from; leaves of the same content are equal whatever it says.
    """

    format: str
    arrays: dict[str, ArrayEntry]
    same_as: str | None = None
    passport: Passport | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A converted checkpoint: the model's config.json, its leaves, and where they came from.

    `source`, `report` and `versions` tell a person what happened, `storage` which files hold it ("files": by path, size
    and, of small ones, SHA-256) and for which mesh they are laid out ("mesh"); `digest` does not depend on them.
    """

    config: dict[str, Any]
    leaves: dict[str, LeafEntry]
    source: dict[str, Any]
    report: dict[str, Any]
    versions: dict[str, str]
    storage: dict[str, Any] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def digest(self) -> str:
        """SHA-256 over config and leaves: equal content gives the same digest wherever and whenever it was made."""
        return digest({"config": self.config, "leaves": {path: _content(leaf) for path, leaf in self.leaves.items()}})

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """The manifest of the converted checkpoint `folder`. Raises CheckpointError that says what the folder is."""
        file = Path(folder) / FILE
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointError(_absent(Path(folder))) from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        return cls._parsed(raw, file)

    @classmethod
    def _parsed(cls, raw: Any, file: Path) -> Self:
        version = raw.get("format_version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise CheckpointError(
                f"{file} has format_version {version}; this version of dsv32_jax reads up to {FORMAT_VERSION}. "
                "Update dsv32_jax, or convert the original checkpoint again"
            )
        problems = _problems(raw)
        if problems:
            raise CheckpointError(
                f"{file} is malformed ({len(problems)} problems): {listing(problems, 20)}. Convert the original again"
            )
        leaves = {path: parse_leaf(leaf) for path, leaf in raw["leaves"].items()}
        return cls(raw["config"], leaves, raw["source"], raw["report"], raw["versions"], raw["storage"])

    def write(self, folder: str | Path) -> None:
        """Write DST/manifest.json so that it is there whole or not at all, also after a power cut."""
        folder = Path(folder)
        raw = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        raw["leaves"] = {path: leaf_dict(leaf) for path, leaf in self.leaves.items()}
        raw["digest"] = self.digest
        temporary = folder / (FILE + ".tmp")
        with open(temporary, "w", encoding="utf-8") as out:
            out.write(_sealed(_text(raw)))
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, folder / FILE)
        sync_folder(folder)


def is_sealed(text: str) -> bool:
    """Whether manifest.json of this `text` is, byte for byte, what was written."""
    return text == _sealed(text[len(_SEAL) + 64 + 3 :])


def digest(content: Any) -> str:
    """SHA-256 of `content` as canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def leaf_dict(leaf: LeafEntry) -> dict[str, Any]:
    """`leaf` as JSON; `parse_leaf` reads it back."""
    return {**_content(leaf), **({} if leaf.passport is None else {"passport": passport.to_json(leaf.passport)})}


def parse_leaf(raw: dict[str, Any]) -> LeafEntry:
    """The LeafEntry that `leaf_dict` wrote. Raises KeyError, TypeError or ValueError on anything else."""
    arrays = {name: ArrayEntry(dtype, tuple(shape), sha) for name, (dtype, shape, sha) in raw["arrays"].items()}
    about = passport.from_json(raw["passport"]) if "passport" in raw else None
    return LeafEntry(raw["format"], arrays, raw.get("same_as"), about)


def _content(leaf: LeafEntry) -> dict[str, Any]:
    """What the digest covers of `leaf`."""
    arrays = {name: [a.dtype, list(a.shape), a.sha256] for name, a in leaf.arrays.items()}
    shared = {} if leaf.same_as is None else {"same_as": leaf.same_as}
    return {"format": leaf.format, "arrays": arrays, **shared}


_SEAL = '{\n "sha256": "'


def _sealed(rest: str) -> str:
    """The whole text of the file: SHA-256 of `rest` in its first line, then `rest`."""
    return f'{_SEAL}{hashlib.sha256(rest.encode()).hexdigest()}",\n{rest}'


def _text(raw: dict[str, Any]) -> str:
    """`raw` as JSON without its opening brace, one leaf a line."""
    lines = [f"  {json.dumps(path)}: {json.dumps(leaf)}" for path, leaf in raw["leaves"].items()]
    short = {key: value for key, value in raw.items() if key not in ("leaves", "storage")}
    text = json.dumps(short, indent=1).removeprefix("{\n").removesuffix("\n}")
    leaves = ",\n".join(lines)
    return f'{text},\n "storage": {json.dumps(raw["storage"])},\n "leaves": {{\n{leaves}\n }}\n}}\n'


def _absent(folder: Path) -> str:
    """Why there is no manifest in `folder`, and what to do."""
    if not folder.is_dir():
        return f"{folder} is not a folder; nothing was read"
    if (folder / JOURNAL).exists():
        return (
            f"{folder} is an unfinished conversion: there is no {FILE}. "
            "Run the same `python -m convert` command again; it continues where it stopped"
        )
    if any(folder.glob("*.safetensors")):
        return (
            f"{folder} holds safetensors, not a converted checkpoint: run `python -m convert {folder} DST` and load DST"
        )
    return f"{folder} is not a converted checkpoint: there is no {FILE}"


def _problems(raw: Any) -> list[str]:
    """Everything that keeps `raw` from being a Manifest's JSON."""
    if not isinstance(raw, dict):
        return ["not a JSON object"]
    if raw.get("format_version") != FORMAT_VERSION or type(raw["format_version"]) is not int:
        return [f"format_version is {raw.get('format_version')!r}, not {FORMAT_VERSION}"]
    keys = ("config", "leaves", "source", "report", "versions", "storage")
    problems = [f"{key} is not an object" for key in keys if not isinstance(raw.get(key), dict)]
    if problems:
        return problems
    for path, leaf in raw["leaves"].items():
        problems += [f"leaf {path}: {problem}" for problem in _leaf_problems(leaf, raw["leaves"])]
    if not problems and raw.get("digest") != digest({"config": raw["config"], "leaves": _contents(raw["leaves"])}):
        problems.append("digest does not match config and leaves: the file was edited or damaged")
    return problems


def _contents(leaves: dict[str, Any]) -> dict[str, Any]:
    """`leaves` as JSON without what the digest does not cover."""
    return {path: {key: leaf[key] for key in leaf if key != "passport"} for path, leaf in leaves.items()}


def _leaf_problems(leaf: Any, leaves: dict[str, Any]) -> list[str]:
    if not isinstance(leaf, dict) or not isinstance(leaf.get("arrays"), dict):
        return ["not an object with arrays"]
    if "passport" in leaf and (wrong := passport.problem(leaf["passport"])):
        return [wrong]
    kind, shared = leaf.get("format"), leaf.get("same_as")
    if not isinstance(kind, str) or kind not in COMPONENTS:
        return [f"format {kind!r} is unknown"]
    if shared is not None:
        other = leaves.get(shared) if isinstance(shared, str) else None
        stored = isinstance(other, dict) and other.get("same_as") is None
        return [] if stored and not leaf["arrays"] else [f"same_as {shared!r} is not a stored leaf"]
    if set(leaf["arrays"]) != COMPONENTS[kind]:
        return [f"{kind} with the arrays {listing(sorted(leaf['arrays'])) or 'none'}"]
    return [f"array {name} is {array!r}" for name, array in leaf["arrays"].items() if not _is_array(array)]


def _is_array(array: Any) -> bool:
    if not isinstance(array, list) or len(array) != 3:
        return False
    dtype, shape, sha = array
    sizes = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    return isinstance(dtype, str) and sizes and isinstance(sha, str) and bool(re.fullmatch("[0-9a-f]{64}", sha))
