"""What a conversion in progress has done: DST/journal.jsonl, a line for each part that is safely on disk."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dsv32_jax.checkpoint.manifest import JOURNAL, LeafEntry, leaf_dict, parse_leaf, sync_folder
from dsv32_jax.errors import OutputExistsError, listing

from ..transform.requantize import ErrorStats
from .identity import differences


class Journal:
    """The journal of the folder `folder`, begun or taken up again. `leaves` and `facts` are what is done, by part,
    `outcomes` what was converted, by weight.

    `plan`, the folder's name `source`, what decides about the result, `basis`, and what told the source's files apart
    when it began, `stamps`, stand in its first line.
    Raises OutputExistsError when the folder holds the beginning of another conversion.
    """

    def __init__(
        self, folder: Path, plan: str, source: str, basis: dict[str, Any], stamps: Mapping[str, list[int]] | None = None
    ):
        self.file = folder / JOURNAL
        self.leaves: dict[str, dict[str, LeafEntry]] = {}
        self.facts: dict[str, dict[str, int]] = {}
        self.outcomes: dict[str, ErrorStats] = {}
        whole, lines = self._lines()
        if not lines:
            lines = [{"plan": plan, "source": source, "basis": basis, "stamps": dict(stamps or {})}]
            self._rewrite(lines)
        elif not whole:
            self._rewrite(lines)
        if lines[0].get("plan") != plan:
            changed = differences(lines[0].get("basis", {}), basis) or ["the weights that the options name"]
            raise OutputExistsError(
                f"{folder} holds an unfinished conversion (of {lines[0].get('source')!r}) with another plan: "
                f"{listing(changed)}. Nothing was touched; convert to another folder, run the command as it was to "
                "continue, or delete this folder yourself"
            )
        self.stamps = lines[0].get("stamps", {})
        for line in lines[1:]:
            self.leaves[line["part"]] = {path: parse_leaf(leaf) for path, leaf in line["leaves"].items()}
            self.facts[line["part"]] = line["facts"]
            self.outcomes |= {name: ErrorStats(*outcome) for name, outcome in line["outcomes"].items()}

    def add(
        self, part: str, leaves: dict[str, LeafEntry], facts: dict[str, int], outcomes: dict[str, ErrorStats]
    ) -> None:
        """Note that `part` is on disk; durable when this returns."""
        entries = {path: leaf_dict(leaf) for path, leaf in leaves.items()}
        line = {"part": part, "leaves": entries, "facts": facts, "outcomes": outcomes}
        with open(self.file, "a", encoding="utf-8") as out:
            out.write(_sealed(line))
            out.flush()
            os.fsync(out.fileno())
        self.leaves[part], self.facts[part] = leaves, facts
        self.outcomes |= outcomes

    def forget(self, parts: Iterable[str]) -> None:
        """Count `parts` as not done; the file still names them, and other parts will come to hold their leaves."""
        for part in list(parts):
            del self.leaves[part], self.facts[part]

    def new_parts(self) -> Iterator[str]:
        """Names for parts that are not in the journal, in order."""
        after = 1 + max(map(int, self.leaves), default=-1)
        return (f"{number:05d}" for number in itertools.count(after))

    def _lines(self) -> tuple[bool, list[dict[str, Any]]]:
        """The lines of the journal, and whether the last was written whole (a killed process may tear it)."""
        try:
            *lines, rest = self.file.read_text(encoding="utf-8", errors="replace").split("\n")
        except FileNotFoundError:
            return True, []
        try:
            return not rest, list(map(_opened, lines))
        except (ValueError, LookupError, TypeError) as error:
            raise OutputExistsError(
                f"{self.file} is damaged ({error}), so what the folder holds is unknown. Nothing was touched; "
                "convert to another folder, or delete this one yourself"
            ) from None

    def _rewrite(self, lines: list[dict[str, Any]]) -> None:
        temporary = self.file.with_suffix(".tmp")
        with open(temporary, "w", encoding="utf-8") as out:
            out.writelines(map(_sealed, lines))
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, self.file)
        sync_folder(self.file.parent)


def _sealed(line: dict[str, Any]) -> str:
    """A line with the SHA-256 of its text."""
    text = json.dumps(line)
    return json.dumps({"line": line, "sha256": hashlib.sha256(text.encode()).hexdigest()}) + "\n"


def _opened(text: str) -> dict[str, Any]:
    """The line that `_sealed` was given. Raises ValueError, LookupError or TypeError where it is another."""
    sealed = json.loads(text)
    if _sealed(sealed["line"]) != text + "\n":
        raise ValueError("a line is not what was written")
    return sealed["line"]
