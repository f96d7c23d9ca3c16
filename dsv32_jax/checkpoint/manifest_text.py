"""The JSON of a manifest: how it is written, what its digest covers, and everything that can be wrong with it."""

import hashlib
import json
import re
from typing import Any

from ..errors import listing
from . import provenance

FORMAT_VERSION = 1

COMPONENTS = {
    "dense": {"values"},
    "nvfp4": {"codes", "block_scale", "tensor_scale"},
    "fp8_block": {"values", "block_scale"},
}
"""The arrays each storage format keeps for one leaf; all of them have the leaf's rank."""

DTYPES = ("uint8", "float8_e4m3fn", "float32", "bfloat16", "float16")
"""The dtypes of stored arrays, as NumPy names them."""


def digest(content: Any) -> str:
    """SHA-256 of `content` as canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(raw: dict[str, Any]) -> str:
    """`raw` as the text of manifest.json: its first line has the SHA-256 of everything after it."""
    return _with_seal(_body(raw))


def is_sealed(text: str) -> bool:
    """Whether manifest.json of this `text` is, byte for byte, what was written."""
    return text == _with_seal(text[len(_SEAL) + 64 + 3 :])


_SEAL = '{\n "sha256": "'


def _with_seal(rest: str) -> str:
    """The whole text of the file: SHA-256 of `rest` in its first line, then `rest`."""
    return f'{_SEAL}{hashlib.sha256(rest.encode()).hexdigest()}",\n{rest}'


def _body(raw: dict[str, Any]) -> str:
    """`raw` as JSON without its opening brace, one leaf a line."""
    lines = [f"  {json.dumps(path)}: {json.dumps(leaf)}" for path, leaf in raw["leaves"].items()]
    short = {key: value for key, value in raw.items() if key not in ("leaves", "storage")}
    text = json.dumps(short, indent=1).removeprefix("{\n").removesuffix("\n}")
    leaves = ",\n".join(lines)
    return f'{text},\n "storage": {json.dumps(raw["storage"])},\n "leaves": {{\n{leaves}\n }}\n}}\n'


def problems(raw: Any) -> list[str]:
    """Everything that keeps `raw` from being a Manifest's JSON."""
    if not isinstance(raw, dict):
        return ["not a JSON object"]
    if raw.get("format_version") != FORMAT_VERSION or type(raw["format_version"]) is not int:
        return [f"format_version is {raw.get('format_version')!r}, not {FORMAT_VERSION}"]
    keys = ("config", "leaves", "source", "report", "versions", "storage")
    found = [f"{key} is not an object" for key in keys if not isinstance(raw.get(key), dict)]
    if found:
        return found
    for path, leaf in raw["leaves"].items():
        found += [f"leaf {path}: {problem}" for problem in _leaf_problems(leaf, raw["leaves"])]
    found += [f"storage of {name} is {file!r}" for name, file in _bad_files(raw["storage"].get("files"))]
    if not found and raw.get("digest") != digest({"config": raw["config"], "leaves": _contents(raw["leaves"])}):
        found.append("digest does not match config and leaves: the file was edited or damaged")
    return found


def _bad_files(files: Any) -> list[tuple[str, Any]]:
    """Entries that are not [size, SHA-256 or null]."""
    if not isinstance(files, dict):
        return [] if files is None else [("files", files)]
    return [(name, file) for name, file in files.items() if not _is_file(file)]


def _is_file(file: Any) -> bool:
    if not isinstance(file, list) or len(file) != 2:
        return False
    return type(file[0]) is int and (file[1] is None or isinstance(file[1], str))


def _contents(leaves: dict[str, Any]) -> dict[str, Any]:
    """`leaves` as JSON without what the digest does not cover."""
    return {path: {key: leaf[key] for key in leaf if key != "passport"} for path, leaf in leaves.items()}


def _leaf_problems(leaf: Any, leaves: dict[str, Any]) -> list[str]:
    if not isinstance(leaf, dict) or not isinstance(leaf.get("arrays"), dict):
        return ["not an object with arrays"]
    if "passport" in leaf and (wrong := provenance.problem(leaf["passport"])):
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
    known = isinstance(dtype, str) and dtype in DTYPES
    sizes = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    return known and sizes and isinstance(sha, str) and bool(re.fullmatch("[0-9a-f]{64}", sha))
