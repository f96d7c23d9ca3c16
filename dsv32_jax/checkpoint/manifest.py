"""The manifest of a converted checkpoint, FOLDER/manifest.json: every weight, its files and its checksums.

It is written last, so a folder with a manifest is complete. Reading it needs neither JAX nor NumPy.
"""

import collections
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from ..errors import CheckpointError, StorageError, VerificationError, listing, pluralize
from ..system.files import JsonLimits, expand_path, find_mismatches, limit_json, read_regular, write_file
from ..system.progress import format_size
from ..system.summary import Summarized
from .folder import FILE, JOURNAL, LARGEST, RECOVER, RENEW, SCHEMA, UNSEALED, WEIGHTS, explain_absence

FORMAT_VERSION = 3
LIMITS = JsonLimits(objects=500_000, lists=4_000_000, commas=20_000_000)
"""Limits of a manifest. The real model's has 20 MB in NVFP4, and 180,000 source tensors."""

COMPONENTS = {
    "dense": {"values"},
    "nvfp4": {"codes", "block_scale", "tensor_scale"},
    "fp8_block": {"values", "block_scale"},
}
"""The arrays that store a weight in each format. They all have the weight's rank."""

ITEM_BYTES = {"uint8": 1, "float8_e4m3fn": 1, "float32": 4, "bfloat16": 2, "float16": 2}
"""Item sizes of the dtypes that arrays are stored in, by NumPy name."""


class Place(NamedTuple):
    """The files that hold an array, relative to the checkpoint. Several files are equal slices along `axis`."""

    files: tuple[str, ...] = ()
    axis: int = 0


@dataclasses.dataclass(frozen=True)
class ArrayEntry:
    """One stored array: NumPy dtype name, shape, SHA-256 of its bytes in C order, and location.

    Entries of equal content compare equal wherever they are stored.
    """

    dtype: str
    shape: tuple[int, ...]
    sha256: str
    place: Place = dataclasses.field(default=Place(), compare=False)

    @property
    def nbytes(self) -> int:
        """Size of the whole array."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def piece(self) -> tuple[int, ...]:
        """Shape of the slice in one file."""
        axis, count = self.place.axis, len(self.place.files)
        return tuple(size // count if i == axis else size for i, size in enumerate(self.shape))

    @property
    def part(self) -> str:
        """Name of the part, a folder in WEIGHTS, that the files are in."""
        return self.place.files[0].split("/")[1]

    @classmethod
    def from_json(cls, raw: Any) -> Self:
        """Parse the output of `to_json`. Raise CheckpointError for anything else."""
        try:
            place = Place(tuple(raw["files"]), raw.get("axis", 0))
            entry = cls(raw["dtype"], tuple(raw["shape"]), raw["sha256"], place)
            sizes = all(type(size) is int and size >= 0 for size in (*entry.shape, place.axis))
            count, named = len(place.files), all(map(_is_array_file, place.files))
            even = place.axis == 0 if count == 1 else place.axis > 0 and entry.shape[place.axis] % count == 0
            if sizes and count and named and even and re.fullmatch("[0-9a-f]{64}", entry.sha256):
                if raw["nbytes"] == entry.nbytes:
                    return entry
        except (KeyError, TypeError, AttributeError, IndexError):
            pass
        raise CheckpointError(f"invalid array {raw!r:.400}")

    def to_json(self) -> dict[str, Any]:
        """Return the entry as JSON. `nbytes` follows from dtype and shape; it is there for other readers."""
        known = {"dtype": self.dtype, "shape": list(self.shape), "nbytes": self.nbytes, "sha256": self.sha256}
        axis = {"axis": self.place.axis} if self.place.axis else {}
        return {**known, "files": list(self.place.files), **axis}


@dataclasses.dataclass(frozen=True)
class LeafEntry:
    """One weight: its format and arrays, or (`same_as`) the weight whose arrays it shares.

    `provenance` is the converter's record of the tensors it was made of. Weights of equal content compare equal
    whatever they were made of.
    """

    format: str
    arrays: dict[str, ArrayEntry]
    same_as: str | None = None
    provenance: dict[str, Any] | None = dataclasses.field(default=None, compare=False)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of the weight, whatever it is packed into; None if it shares the arrays of another."""
        if self.format == "nvfp4" and self.arrays:
            *out, packed = self.arrays["codes"].shape
            return (*out, 2 * packed)
        return self.arrays["values"].shape if self.arrays else None

    def at(self, path: str, places: Mapping[tuple[str, str], Place]) -> Self:
        """Return this entry with its arrays at `places`, which are keyed by the weight's `path` and component."""
        arrays = {name: dataclasses.replace(array, place=places[path, name]) for name, array in self.arrays.items()}
        return dataclasses.replace(self, arrays=arrays)

    @property
    def content(self) -> dict[str, Any]:
        """The part of the entry that the manifest's digest covers, as JSON."""
        arrays = {name: [a.dtype, list(a.shape), a.sha256] for name, a in self.arrays.items()}
        shared = {} if self.same_as is None else {"same_as": self.same_as}
        return {"format": self.format, "arrays": arrays, **shared}

    @classmethod
    def from_json(cls, raw: Any) -> Self:
        """Parse the output of `to_json`. Raise CheckpointError for anything else."""
        if not isinstance(raw, dict) or not isinstance(raw.get("arrays"), dict):
            raise CheckpointError("not an object with arrays")
        format, same_as = raw.get("format"), raw.get("same_as")
        if not isinstance(format, str) or format not in COMPONENTS:
            raise CheckpointError(f"unknown format {format!r:.200}")
        if same_as is not None and not isinstance(same_as, str):
            raise CheckpointError(f"same_as is {same_as!r:.200}")
        if set(raw["arrays"]) != (COMPONENTS[format] if same_as is None else set()):
            raise CheckpointError(f"{format} with the arrays {listing(sorted(raw['arrays'])) or 'none'}")
        arrays = {name: ArrayEntry.from_json(array) for name, array in raw["arrays"].items()}
        return cls(format, arrays, same_as, raw.get("provenance"))

    def to_json(self) -> dict[str, Any]:
        """Return the entry as JSON."""
        arrays = {name: array.to_json() for name, array in self.arrays.items()}
        return {**self.content, "arrays": arrays, "provenance": self.provenance}


@dataclasses.dataclass(frozen=True, repr=False)
class Manifest(Summarized):
    """A converted checkpoint: config.json of the model, its weights, and where they came from.

    `source`, `report` and `versions` are informative (SCHEMA). `storage` has the size and SHA-256 of every file that
    holds no array ("files") and the mesh the arrays are laid out for ("mesh"). None of these is part of the digest.
    """

    config: dict[str, Any]
    leaves: dict[str, LeafEntry]
    source: dict[str, Any]
    report: dict[str, Any]
    versions: dict[str, str]
    storage: dict[str, Any]
    format_version: int = FORMAT_VERSION

    @property
    def digest(self) -> str:
        """SHA-256 of config and weights: equal for equal content, wherever and whenever it was converted."""
        return digest({"config": self.config, "leaves": {path: leaf.content for path, leaf in self.leaves.items()}})

    def summary(self) -> tuple[str, dict[str, str]]:
        """Return how many weights there are, their formats, their size and the digest."""
        formats = collections.Counter(leaf.format for leaf in self.leaves.values())
        return f"Manifest of {pluralize(len(self.leaves), 'weight')}", {
            "formats": ", ".join(f"{count} {name}" for name, count in formats.most_common()),
            "size": format_size(sum(array.nbytes for leaf in self.leaves.values() for array in leaf.arrays.values())),
            "digest": self.digest,
        }

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Read the manifest of the converted checkpoint `folder`.

        Raises CheckpointError where there is none or it is not of this version, VerificationError where it is not what
        was written, byte for byte, StorageError where it cannot be read.
        """
        file = Path(folder, FILE)
        content = _read_sealed(file)
        try:
            raw = json.loads(limit_json(content, LIMITS))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file} is no manifest: {error}") from error
        leaves, problems = _parse(raw)
        if not problems:
            manifest = cls(raw["config"], leaves, *(raw[key] for key in ("source", "report", "versions", "storage")))
            try:
                if raw.get("digest") == manifest.digest:
                    return manifest
                problems = ["its digest does not match config and weights: it was edited or damaged"]
            except ValueError as error:
                problems = [f"its config holds NaN or infinity ({error})"]
        raise CheckpointError(
            f"{file} is invalid ({pluralize(len(problems), 'problem')}): {listing(problems, 20)}. {_advise(raw)}"
        )

    def write(self, folder: str | Path) -> None:
        """Write FOLDER/manifest.json atomically: one weight per line, and first the SHA-256 of everything below it."""
        raw = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "leaves"}
        short = json.dumps(raw | {"digest": self.digest}, indent=1).removeprefix("{\n").removesuffix("\n}")
        lines = (f"  {json.dumps(path)}: {json.dumps(leaf.to_json())}" for path, leaf in self.leaves.items())
        text = short + ',\n "leaves": {\n' + ",\n".join(lines) + "\n }\n}\n"
        write_file(Path(folder, FILE), seal(text.encode()))


def is_complete(folder: str | Path) -> bool:
    """Return whether `folder` has a manifest."""
    return (expand_path(folder) / FILE).exists()


def is_converted(folder: Path) -> bool:
    """Return whether `folder` is a converted checkpoint, finished or not."""
    return (folder / FILE).exists() or (folder / JOURNAL).exists()


def is_inside(name: str) -> bool:
    """Return whether `name` is a relative path that does not leave its folder. Links are rejected when a file is
    opened."""
    return 0 < len(name) < 1024 and "\0" not in name and not {"", ".", ".."} & set(name.split("/"))


def seal(rest: bytes) -> bytes:
    """Return the content of a manifest from the `rest` of it, all but its first line."""
    return b'{\n "sha256": "%s",\n%s' % (hashlib.sha256(rest).hexdigest().encode(), rest)


def _read_sealed(file: Path) -> bytes:
    """Return the content of the manifest `file`.

    Raises CheckpointError where there is none or an earlier version wrote it, VerificationError where it is not what
    was written, byte for byte, StorageError where it cannot be read.
    """
    try:
        content = read_regular(file, LARGEST)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(explain_absence(file.parent)) from None
    except CheckpointError as error:
        raise VerificationError(f"{error}. {RECOVER}") from None
    except OSError as error:
        raise StorageError(f"{file} cannot be read: {error.strerror}") from error
    if content == seal(content.partition(b",\n")[2]):
        return content
    if UNSEALED in content:
        raise CheckpointError(f"{file} is of another format. {RENEW}")
    raise VerificationError(
        f"{file} has changed since it was written, and everything else is checked against it. {RECOVER}"
    )


def digest(content: Any) -> str:
    """Return the SHA-256 of `content` as canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_array_file(name: str) -> bool:
    return name.startswith(WEIGHTS + "/") and name.count("/") == 3 and is_inside(name)


def _parse(raw: Any) -> tuple[dict[str, LeafEntry], list[str]]:
    """Return the weights in the JSON of a manifest, and everything that is wrong with it."""
    if not isinstance(raw, dict):
        return {}, ["not a JSON object"]
    if raw.get("format_version") != FORMAT_VERSION:
        return {}, [f"format_version is {raw.get('format_version')!r:.200}, not {FORMAT_VERSION}"]
    if problems := find_mismatches(raw, SCHEMA, "manifest"):
        return {}, problems
    leaves: dict[str, LeafEntry] = {}
    for path, leaf in raw["leaves"].items():
        try:
            leaves[path] = LeafEntry.from_json(leaf)
        except CheckpointError as error:
            problems.append(f"leaf {path}: {error}")
    for path, leaf in leaves.items():
        if leaf.same_as is not None and (leaf.same_as not in leaves or leaves[leaf.same_as].same_as is not None):
            problems.append(f"leaf {path}: same_as {leaf.same_as!r} is not a stored leaf")
    arrays = [array for leaf in leaves.values() for array in leaf.arrays.values()]
    counts = collections.Counter(file for array in arrays for file in array.place.files)
    problems += [f"{file} holds {count} arrays" for file, count in counts.items() if count > 1]
    for name, file in raw["storage"]["files"].items():
        if not is_inside(name) or [type(value) for value in file] != [int, str]:
            problems.append(f"storage of {name} is {file!r:.200}")
    return leaves, problems


def _advise(raw: Any) -> str:
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        return "Update dsv32_jax, or convert the original checkpoint again"
    if type(version) is int and version < FORMAT_VERSION:
        return RENEW
    return "Convert the original checkpoint again"
