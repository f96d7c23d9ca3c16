"""What a converted checkpoint says about itself: DST/manifest.json, written last.

A folder with a manifest is complete; one without is unfinished or something else. Nothing here needs JAX or NumPy.
"""

import dataclasses
import json
import os
import stat
from pathlib import Path
from typing import Any, Self

from ..errors import CheckpointError, listing
from ..system.files import expand_path, write_file
from . import provenance
from .manifest_text import COMPONENTS as COMPONENTS
from .manifest_text import FORMAT_VERSION as FORMAT_VERSION
from .manifest_text import digest as digest
from .manifest_text import problems, sealed
from .provenance import Passport

FILE = "manifest.json"
LARGEST = 1 << 30
"""Bytes of a manifest that are read; that of the real model in NVFP4 has about 40 MB."""

JOURNAL = "journal.jsonl"
"""What a conversion in progress has done so far (`convert` writes it and removes it when the manifest stands)."""


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
            status = file.stat()
            if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST:
                raise ValueError(f"not a regular file of at most {LARGEST} bytes")
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
        found = problems(raw)
        if found:
            raise CheckpointError(
                f"{file} is malformed ({len(found)} problems): {listing(found, 20)}. Convert the original again"
            )
        leaves = {path: parse_leaf(leaf) for path, leaf in raw["leaves"].items()}
        return cls(raw["config"], leaves, raw["source"], raw["report"], raw["versions"], raw["storage"])

    def write(self, folder: str | Path) -> None:
        """Write DST/manifest.json so that it is there whole or not at all, also after a power cut."""
        folder = Path(folder)
        raw = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        raw["leaves"] = {path: leaf_dict(leaf) for path, leaf in self.leaves.items()}
        raw["digest"] = self.digest
        write_file(folder / FILE, sealed(raw).encode())


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def leaf_dict(leaf: LeafEntry) -> dict[str, Any]:
    """`leaf` as JSON; `parse_leaf` reads it back."""
    return {**_content(leaf), **({} if leaf.passport is None else {"passport": provenance.to_json(leaf.passport)})}


def parse_leaf(raw: dict[str, Any]) -> LeafEntry:
    """The LeafEntry that `leaf_dict` wrote. Raises KeyError, TypeError or ValueError on anything else."""
    arrays = {name: ArrayEntry(dtype, tuple(shape), sha) for name, (dtype, shape, sha) in raw["arrays"].items()}
    about = provenance.from_json(raw["passport"]) if "passport" in raw else None
    return LeafEntry(raw["format"], arrays, raw.get("same_as"), about)


def _content(leaf: LeafEntry) -> dict[str, Any]:
    """What the digest covers of `leaf`."""
    arrays = {name: [a.dtype, list(a.shape), a.sha256] for name, a in leaf.arrays.items()}
    shared = {} if leaf.same_as is None else {"same_as": leaf.same_as}
    return {"format": leaf.format, "arrays": arrays, **shared}


def is_complete(folder: str | Path) -> bool:
    """Whether `folder` has a manifest, which is written last."""
    return (expand_path(folder) / FILE).exists()


def is_converted(folder: Path) -> bool:
    """Whether `folder` is a converted checkpoint, or one that is being made."""
    return (folder / FILE).exists() or (folder / JOURNAL).exists()


def _absent(folder: Path) -> str:
    """Why there is no manifest in `folder`, and what to do."""
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
