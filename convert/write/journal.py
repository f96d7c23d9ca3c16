"""The journal of an unfinished output, DST/journal.jsonl, and whether an output belongs to the job at hand.

A part is named in the journal before its folder is made, and again, with its parameters, once it is on disk. Anything
else in the output was not written by this job and is never deleted.
"""

import hashlib
import itertools
import json
import os
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dsv32_jax.checkpoint.folder import FILE, JOURNAL, SOURCE_FILES, is_stray
from dsv32_jax.checkpoint.manifest import LeafEntry, Manifest
from dsv32_jax.checkpoint.reader import Reader
from dsv32_jax.checkpoint.writer import UNFINISHED
from dsv32_jax.errors import OutputExistsError, StorageError, listing, pluralize
from dsv32_jax.system.files import find_mismatches, hash_chunks, is_abandoned, remove_abandoned, write_file
from dsv32_jax.system.locks import LOCK

from ..read.provenance import list_sources
from ..read.safetensors import Tensor
from ..read.source import Source
from ..transform.requantize import ErrorStats
from .differences import describe_differences

PROBE_BYTES = 16 << 20
"""Largest tensor that is read again in each file before a conversion continues."""

BASIS = {"format_version": int, "config": dict, "files": SOURCE_FILES, "recipe": list, "mesh": {str: int}}
HEADER = {"plan": str, "source": str, "basis": BASIS, "stamps": {str: [int]}}
BEGIN = {"begin": str}
PART = {"part": str, "leaves": dict, "facts": {str: int}, "outcomes": {str: [(int, float)]}}
"""The forms of the lines of a journal."""


def require_ours(dst: Path) -> None:
    """Raise OutputExistsError if `dst` exists and holds anything but a conversion, finished or not."""
    try:
        names = {name for name in os.listdir(dst) if name != LOCK and not is_stray(name)}
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise OutputExistsError(f"{dst} is a file; nothing was touched. Write to another folder") from None
    if not names & {FILE, JOURNAL} and not all(is_abandoned(name, JOURNAL) for name in names):
        entries = pluralize(len(names), "entry", "entries")
        raise OutputExistsError(
            f"{dst} holds something else ({entries}: {listing(sorted(names))}); nothing was touched. "
            "Write to another folder, or empty this one yourself"
        )


class Part(NamedTuple):
    """A part that is on disk: its parameters' manifest entries, counts of odd scales, outcomes of quantized weights."""

    name: str
    entries: dict[str, LeafEntry]
    counts: dict[str, int]
    outcomes: dict[str, ErrorStats]


class Journal:
    """The journal in `folder`; nothing is changed before `start`. `parts` are those on disk, by name;
    `unfinished`, folders that killed runs left.

    The first line holds the digest of the `plan`, the source's name, everything a user can change (`basis`), and the
    inodes and times of the source's files (`stamps`). Raises OutputExistsError where the journal is damaged or of
    another plan.
    """

    def __init__(
        self, folder: Path, plan: str, source: str, basis: dict[str, Any], stamps: Mapping[str, list[int]] | None = None
    ):
        self.file = folder / JOURNAL
        header, *lines = _read_lines(self.file) or [
            {"plan": plan, "source": source, "basis": basis, "stamps": dict(stamps or {})}
        ]
        if header["plan"] != plan:
            changed = describe_differences(header["basis"], basis)
            raise OutputExistsError(
                f"{folder} holds an unfinished conversion (of {header['source']!r}) with another plan: "
                f"{listing(changed)}. Nothing was touched; use another folder, run the original command to "
                "continue, or delete this folder yourself"
            )
        self._header = header
        self.stamps: dict[str, list[int]] = header["stamps"]
        self.parts = {line.name: line for line in lines if isinstance(line, Part)}
        self.unfinished: list[str] = []
        self._begun = {line for line in lines if isinstance(line, str)}

    @property
    def entries(self) -> dict[str, LeafEntry]:
        """The manifest entries of all parameters that are on disk, by path."""
        return {path: entry for part in self.parts.values() for path, entry in part.entries.items()}

    def reconcile(self, weights: Path) -> None:
        """Forget parts whose folder in `weights` is gone.

        Raises OutputExistsError where anything else lies in `weights`, but for strays of file managers.
        """
        try:
            entries = [] if weights.is_symlink() else list(os.scandir(weights))
        except FileNotFoundError:
            entries = []
        found = {entry.name: entry for entry in entries if not is_stray(entry.name)}
        ours = {name for name, entry in found.items() if self._is_ours(entry)}
        if weights.is_symlink() or ours != found.keys():
            foreign = listing(sorted(found.keys() - ours)) or "it is a link"
            raise OutputExistsError(
                f"{weights} holds something that this job did not write ({foreign}); nothing was touched. "
                "Move it away, or use another folder"
            )
        self.unfinished = [found[name].path for name in ours - self.parts.keys()]
        stored = [name for name, part in self.parts.items() if any(entry.arrays for entry in part.entries.values())]
        for name in set(stored) - ours:
            del self.parts[name]

    def _is_ours(self, entry: os.DirEntry) -> bool:
        part = entry.name.partition(UNFINISHED)[0]
        return entry.is_dir(follow_symlinks=False) and (part in self._begun or part in self.parts)

    def count_unfinished_bytes(self) -> int:
        """Return the bytes that `start` frees."""
        files = (Path(root, name) for folder in self.unfinished for root, _, names in os.walk(folder) for name in names)
        return sum(map(os.path.getsize, files))

    def start(self) -> None:
        """Remove what killed runs left of unfinished parts, and create the journal where there is none; everything
        else in the folder is made after it."""
        remove_abandoned(self.file.parent)
        for folder in self.unfinished:
            shutil.rmtree(folder)
        if self.file.exists():
            _cut_torn_line(self.file)
        else:
            write_file(self.file, seal(self._header).encode())

    def begin(self, part: str) -> None:
        """Record that the folder of `part` is about to be made."""
        if part not in self._begun:
            self._append({"begin": part})
            self._begun.add(part)

    def begin_new(self) -> Iterator[str]:
        """Begin parts under numbers that are not on disk yet, in order."""
        for number in itertools.count(1 + max(map(int, self.parts), default=-1)):
            self.begin(f"{number:05d}")
            yield f"{number:05d}"

    def add(self, part: Part) -> None:
        """Record that `part` is on disk; durable when this returns."""
        leaves = {path: entry.to_json() for path, entry in part.entries.items()}
        self._append({"part": part.name, "leaves": leaves, "facts": part.counts, "outcomes": part.outcomes})
        self.parts[part.name] = part

    def complete(self, manifest: Manifest) -> None:
        """Write the manifest, which makes the folder a converted checkpoint, if its files are there; then end."""
        if problems := Reader(self.file.parent, manifest.leaves).find_problems():
            raise StorageError(f"{self.file.parent} was written but reads back as something else: {listing(problems)}")
        manifest.write(self.file.parent)
        self.file.unlink()

    def _append(self, line: dict[str, Any]) -> None:
        descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
        with open(descriptor, "w", encoding="utf-8") as out:
            out.write(seal(line))
            out.flush()
            os.fsync(out.fileno())


def _read_lines(file: Path) -> list[Any] | None:
    """Return the first line of a journal, and for each other one the name of the part that it begins, or the Part.

    None where there is no journal. A last line that a killed process tore is left out.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                raise ValueError("it is a hard link, or no regular file")
            lines = _parse_lines([unseal(text.decode()) for text in stream.read().split(b"\n")[:-1]])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise OutputExistsError(
            f"{file} is damaged ({error}), so what the folder holds is unknown. Nothing was touched; "
            "use another folder, or delete this one yourself"
        ) from None
    return lines


def _cut_torn_line(file: Path) -> None:
    """Cut off a last line that a killed process tore."""
    with open(os.open(file, os.O_RDWR | os.O_NOFOLLOW), "r+b") as stream:
        content = stream.read()
        if torn := len(content) - content.rfind(b"\n") - 1:
            stream.truncate(len(content) - torn)
            os.fsync(stream.fileno())


def _parse_lines(lines: list[Any]) -> list[Any]:
    """Return what `_read_lines` does. Raises ValueError that lists everything that is not as in a journal."""
    if not lines:
        raise ValueError("it has no first line")
    forms = [HEADER, *(BEGIN if "begin" in line else PART for line in lines[1:])]
    problems = [
        problem
        for number, (line, form) in enumerate(zip(lines, forms, strict=True), 1)
        for problem in find_mismatches(line, form, f"line {number}")
    ]
    if problems:
        raise ValueError(listing(problems))
    names = [line.get("begin") or line["part"] for line in lines[1:]]
    if wrong := [name for name in names if not name.isdecimal()]:
        raise ValueError(f"a part is called {wrong[0]!r:.200}")
    return [lines[0], *(line.get("begin") or _parse_part(line) for line in lines[1:])]


def _parse_part(line: dict[str, Any]) -> Part:
    """Return the Part that `Journal.add` recorded. Raises ValueError or TypeError for anything else."""
    entries = {path: LeafEntry.from_json(leaf) for path, leaf in line["leaves"].items()}
    outcomes = {name: ErrorStats(*outcome) for name, outcome in line["outcomes"].items()}
    return Part(line["part"], entries, line["facts"], outcomes)


def seal(line: dict[str, Any]) -> str:
    """Return a line of text that `unseal` accepts while no character of it changes."""
    text = json.dumps(line)
    return json.dumps({"line": line, "sha256": hashlib.sha256(text.encode()).hexdigest()}) + "\n"


def unseal(text: str) -> dict[str, Any]:
    """Return what `seal` was given. Raises ValueError, LookupError or TypeError where the text is another."""
    sealed = json.loads(text)
    if seal(sealed["line"]) != text + "\n":
        raise ValueError("a line has changed")
    return sealed["line"]


def require_same_bytes(source: Source, entries: Iterable[LeafEntry], touched: Collection[str] = ()) -> None:
    """Raise OutputExistsError where tensors that were converted before have other bytes now.

    Headers do not show that another training of the same model took the checkpoint's place, or that a damaged file was
    downloaded again. So one converted tensor of each file is read again, and all of those files that were `touched`.
    """
    digests = {name: recorded.sha256 for name, recorded in list_sources(entries).items()}
    probes: dict[str, Tensor] = {}
    converted = [source.tensors[name] for name in digests if name in source.tensors]
    for tensor in converted:
        best = probes.get(tensor.file.name)
        if tensor.nbytes <= PROBE_BYTES and (best is None or tensor.nbytes > best.nbytes):
            probes[tensor.file.name] = tensor
    again = [probes[name] for name in sorted(probes) if name not in touched]
    again += [tensor for tensor in converted if tensor.file.name in touched]
    changed = [f"{t.name} in {t.file.name}" for t in again if hash_chunks(source.read_chunks(t)) != digests[t.name]]
    if changed:
        raise OutputExistsError(
            f"the source has changed since this conversion began: {len(changed)} of {len(again)} tensors that were "
            f"read again have other bytes ({listing(changed)}). Nothing was touched; "
            "convert to another folder, or delete this one yourself"
        )
