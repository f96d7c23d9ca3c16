"""The manifest of a converted checkpoint: FOLDER/manifest.json, written last. Reading it needs neither JAX nor NumPy.

A folder with a manifest is complete; one without is unfinished or something else.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from ..errors import CheckpointError, listing
from ..system.files import expand_path, write_file
from .provenance import Passport

FILE = "manifest.json"
WEIGHTS = "weights"
"""The folder of the arrays, below that of the manifest."""

JOURNAL = "journal.jsonl"
"""The record of a conversion in progress; `convert` removes it when the manifest stands."""

FORMAT_VERSION = 2
LARGEST = 1 << 30
"""The largest manifest that is read, in bytes; that of the real model in NVFP4 has about 40 MB."""

COMPONENTS = {
    "dense": {"values"},
    "nvfp4": {"codes", "block_scale", "tensor_scale"},
    "fp8_block": {"values", "block_scale"},
}
"""The arrays of a weight in each storage format; all of them have the rank of the weight."""

ITEM_BYTES = {"uint8": 1, "float8_e4m3fn": 1, "float32": 4, "bfloat16": 2, "float16": 2}
"""The dtypes of stored arrays, as NumPy names them, and their sizes."""


class Place(NamedTuple):
    """The files that hold an array, relative to the checkpoint's folder. More than one are equal pieces of `axis`."""

    files: tuple[str, ...] = ()
    axis: int = 0


@dataclasses.dataclass(frozen=True)
class ArrayEntry:
    """One stored array: NumPy dtype name, shape, SHA-256 of its bytes in C order, and where these lie.

    Arrays of the same content are equal wherever they lie.
    """

    dtype: str
    shape: tuple[int, ...]
    sha256: str
    place: Place = dataclasses.field(default=Place(), compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def piece(self) -> tuple[int, ...]:
        """The shape of what one file holds."""
        axis, count = self.place.axis, len(self.place.files)
        return tuple(size // count if i == axis else size for i, size in enumerate(self.shape))

    @property
    def part(self) -> str:
        """The part of the checkpoint that holds it."""
        return self.place.files[0].split("/")[1]


@dataclasses.dataclass(frozen=True)
class LeafEntry:
    """One weight: its storage format and arrays, or (`same_as`) the weight whose arrays it shares.

    `origin` is the JSON of its passport. Weights of the same content are equal wherever they come from.
    """

    format: str
    arrays: dict[str, ArrayEntry]
    same_as: str | None = None
    origin: dict[str, Any] | None = dataclasses.field(default=None, compare=False)

    @functools.cached_property
    def passport(self) -> Passport | None:
        """Its provenance, parsed when it is asked for: of the real model that takes longer than everything else."""
        return None if self.origin is None else Passport.from_json(self.origin)

    def at(self, path: str, places: Mapping[tuple[str, str], Place]) -> Self:
        """Return the entry with its arrays in `places`, by the `path` of the weight and the name of the component."""
        arrays = {name: dataclasses.replace(a, place=places[path, name]) for name, a in self.arrays.items()}
        return dataclasses.replace(self, arrays=arrays)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A converted checkpoint: the model's config.json, its weights, and where they came from.

    `source`, `report` and `versions` are for people. `storage` lists the files that hold no array ("files": size and
    SHA-256 by path) and the mesh that the arrays are laid out for ("mesh"). None of these is part of the digest.
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
        """SHA-256 over config and weights: the same for the same content, wherever and whenever it was made."""
        return digest({"config": self.config, "leaves": {path: _content(leaf) for path, leaf in self.leaves.items()}})

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Return the manifest of the converted checkpoint `folder`. Raises CheckpointError that says what is there."""
        file = Path(folder) / FILE
        try:
            status = file.stat()
            if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST:
                raise ValueError(f"not a regular file of at most {LARGEST} bytes")
            raw = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointError(_explain_absence(Path(folder))) from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        return cls._parse(raw, file)

    @classmethod
    def _parse(cls, raw: Any, file: Path) -> Self:
        version = raw.get("format_version") if isinstance(raw, dict) else None
        if type(version) is int and version > FORMAT_VERSION:
            raise CheckpointError(
                f"{file} has format_version {version}, and this version of dsv32_jax reads {FORMAT_VERSION}. "
                "Update dsv32_jax, or convert the original checkpoint again"
            )
        if version == 1:
            raise CheckpointError(
                f"{file} was written by an earlier version of dsv32_jax (format_version 1), whose files are no longer "
                "read. Convert the original checkpoint again, to a new folder: `dsv32 convert SRC DST`"
            )
        leaves, problems = _parse_leaves(raw)
        if not problems:
            manifest = cls(raw["config"], leaves, *(raw[key] for key in ("source", "report", "versions", "storage")))
            if raw.get("digest") == manifest.digest:
                return manifest
            problems = ["its digest does not match config and weights, so it was edited or damaged"]
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        raise CheckpointError(
            f"{file} is malformed ({count}): {listing(problems, 20)}. Convert the original checkpoint again"
        )

    def write(self, folder: str | Path) -> None:
        """Write FOLDER/manifest.json, whole or not at all; durable on return."""
        raw = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        raw["leaves"] = {path: leaf_dict(leaf) for path, leaf in self.leaves.items()}
        raw["digest"] = self.digest
        write_file(Path(folder, FILE), _seal(_body(raw)).encode())


def sync_folder(folder: str | Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_complete(folder: str | Path) -> bool:
    """Whether `folder` has a manifest, which is written last."""
    return (expand_path(folder) / FILE).exists()


def is_converted(folder: Path) -> bool:
    """Whether `folder` is a converted checkpoint, or one in the making."""
    return (folder / FILE).exists() or (folder / JOURNAL).exists()


def is_inside(name: str) -> bool:
    """Whether `name`, a path that a file gives, stays below the folder of that file. (Links are refused on opening.)"""
    return 0 < len(name) < 1024 and "\0" not in name and not {"", ".", ".."} & set(name.split("/"))


def digest(content: Any) -> str:
    """Return the SHA-256 of `content` as canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def is_sealed(text: str) -> bool:
    """Whether the `text` of a manifest.json is, byte for byte, as it was written."""
    return text == _seal(text[len(_SEAL) + 64 + 3 :])


_SEAL = '{\n "sha256": "'


def _seal(rest: str) -> str:
    """Return the text of the file: in its first line the SHA-256 of the `rest`, then the rest."""
    return f'{_SEAL}{hashlib.sha256(rest.encode()).hexdigest()}",\n{rest}'


def _body(raw: dict[str, Any]) -> str:
    """Return `raw` as JSON without its opening brace, one weight a line."""
    lines = [f"  {json.dumps(path)}: {json.dumps(leaf)}" for path, leaf in raw["leaves"].items()]
    short = {key: value for key, value in raw.items() if key not in ("leaves", "storage")}
    text = json.dumps(short, indent=1).removeprefix("{\n").removesuffix("\n}")
    leaves = ",\n".join(lines)
    return f'{text},\n "storage": {json.dumps(raw["storage"])},\n "leaves": {{\n{leaves}\n }}\n}}\n'


def leaf_dict(leaf: LeafEntry) -> dict[str, Any]:
    """Return `leaf` as JSON; `parse_leaf` reads it back."""
    raw = _content(leaf)
    for name, array in leaf.arrays.items():
        where = {"files": list(array.place.files), **({"axis": array.place.axis} if array.place.axis else {})}
        known = {"dtype": array.dtype, "shape": list(array.shape), "nbytes": array.nbytes, "sha256": array.sha256}
        raw["arrays"][name] = known | where
    return raw if leaf.origin is None else raw | {"passport": leaf.origin}


def parse_leaf(raw: Any) -> LeafEntry:
    """Return the entry that `leaf_dict` wrote. Raises ValueError that says what else it is."""
    if not isinstance(raw, dict) or not isinstance(raw.get("arrays"), dict):
        raise ValueError("not an object with arrays")
    format, same_as = raw.get("format"), raw.get("same_as")
    if not isinstance(format, str) or format not in COMPONENTS:
        raise ValueError(f"format {format!r} is unknown")
    if same_as is not None and not isinstance(same_as, str):
        raise ValueError(f"same_as is {same_as!r:.200}")
    if set(raw["arrays"]) != (COMPONENTS[format] if same_as is None else set()):
        raise ValueError(f"{format} with the arrays {listing(sorted(raw['arrays'])) or 'none'}")
    arrays = {name: _parse_array(name, array) for name, array in raw["arrays"].items()}
    return LeafEntry(format, arrays, same_as, raw.get("passport"))


def _parse_array(name: str, raw: Any) -> ArrayEntry:
    try:
        place = Place(tuple(raw["files"]), raw.get("axis", 0))
        entry = ArrayEntry(raw["dtype"], tuple(raw["shape"]), raw["sha256"], place)
        sizes = all(type(size) is int and size >= 0 for size in (*entry.shape, place.axis))
        whole = len(place.files) == 1 and place.axis == 0
        cut = len(place.files) > 1 and place.axis > 0 and entry.shape[place.axis] % len(place.files) == 0
        named = all(file.startswith(WEIGHTS + "/") and file.count("/") == 3 and is_inside(file) for file in place.files)
        if sizes and (whole or cut) and named and re.fullmatch("[0-9a-f]{64}", entry.sha256):
            if raw["nbytes"] == entry.nbytes:
                return entry
    except (KeyError, TypeError, AttributeError, IndexError):
        pass
    raise ValueError(f"array {name} is {raw!r:.400}")


def _parse_leaves(raw: Any) -> tuple[dict[str, LeafEntry], list[str]]:
    """Return the weights of a manifest's JSON, and everything that is wrong with it."""
    if not isinstance(raw, dict):
        return {}, ["not a JSON object"]
    if raw.get("format_version") != FORMAT_VERSION:
        return {}, [f"format_version is {raw.get('format_version')!r}, not {FORMAT_VERSION}"]
    keys = ("config", "leaves", "source", "report", "versions", "storage")
    if problems := [f"{key} is not an object" for key in keys if not isinstance(raw.get(key), dict)]:
        return {}, problems
    leaves: dict[str, LeafEntry] = {}
    for path, leaf in raw["leaves"].items():
        try:
            leaves[path] = parse_leaf(leaf)
        except ValueError as error:
            problems.append(f"leaf {path}: {error}")
    for path, leaf in leaves.items():
        if leaf.same_as is not None and (leaf.same_as not in leaves or leaves[leaf.same_as].same_as is not None):
            problems.append(f"leaf {path}: same_as {leaf.same_as!r} is not a stored leaf")
    arrays = [array for leaf in leaves.values() for array in leaf.arrays.values()]
    files = collections.Counter(file for array in arrays for file in array.place.files)
    problems += [f"{file} holds {count} arrays" for file, count in files.items() if count > 1]
    listed = raw["storage"].get("files", {})
    if not isinstance(listed, dict):
        return leaves, [*problems, f"storage of files is {listed!r:.200}"]
    return leaves, problems + [
        f"storage of {name} is {file!r}" for name, file in listed.items() if not _is_file(name, file)
    ]


def _is_file(name: str, file: Any) -> bool:
    return is_inside(name) and isinstance(file, list) and [type(value) for value in file] == [int, str]


def _content(leaf: LeafEntry) -> dict[str, Any]:
    """Return the part of `leaf` that the digest covers."""
    arrays = {name: [a.dtype, list(a.shape), a.sha256] for name, a in leaf.arrays.items()}
    shared = {} if leaf.same_as is None else {"same_as": leaf.same_as}
    return {"format": leaf.format, "arrays": arrays, **shared}


def _explain_absence(folder: Path) -> str:
    """Return why there is no manifest in `folder`, and the way on."""
    if not folder.is_dir():
        return f"{folder} is not a folder; nothing was read"
    if (folder / JOURNAL).exists():
        return (
            f"{folder} is an unfinished conversion: there is no {FILE}. "
            "Run the same `dsv32 convert` command again; it continues where it stopped"
        )
    if any(folder.glob("*.safetensors")):
        return f"{folder} holds safetensors, not a converted checkpoint: run `dsv32 convert {folder} DST` and load DST"
    return f"{folder} is not a converted checkpoint: there is no {FILE}"
