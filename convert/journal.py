"""What a conversion in progress has done: DST/journal.jsonl, a line for each part that is safely on disk."""

import json
import os
from pathlib import Path
from typing import Any

from dsv32_jax.errors import OutputExistsError
from dsv32_jax.manifest import JOURNAL, LeafEntry, leaf_dict, parse_leaf, sync_folder

from .recast import Outcome


class Journal:
    """The journal of the folder `folder`, begun or taken up again. `leaves` and `facts` are what is done, by part,
    `outcomes` what was converted, by weight.

    Raises OutputExistsError when the folder holds the beginning of a conversion with another plan.
    """

    def __init__(self, folder: Path, plan_digest: str, plan_text: dict[str, Any]):
        self.file = folder / JOURNAL
        self.leaves: dict[str, dict[str, LeafEntry]] = {}
        self.facts: dict[str, dict[str, int]] = {}
        self.outcomes: dict[str, Outcome] = {}
        whole, lines = self._lines()
        if not lines:
            lines = [{"plan": plan_digest, **plan_text}]
            self._rewrite(lines)
        elif not whole:
            self._rewrite(lines)
        if lines[0].get("plan") != plan_digest:
            raise OutputExistsError(
                f"{folder} holds an unfinished conversion with another plan (of {lines[0].get('source')!r}): the "
                "source, its config.json or the options have changed since. Nothing was touched; "
                "convert to another folder, or delete this one yourself"
            )
        for line in lines[1:]:
            self.leaves[line["part"]] = {path: parse_leaf(leaf) for path, leaf in line["leaves"].items()}
            self.facts[line["part"]] = line["facts"]
            self.outcomes |= {name: Outcome(*outcome) for name, outcome in line["outcomes"].items()}

    def add(self, part: str, leaves: dict[str, LeafEntry], facts: dict[str, int], outcomes: dict[str, Outcome]) -> None:
        """Note that `part` is on disk; durable when this returns."""
        entries = {path: leaf_dict(leaf) for path, leaf in leaves.items()}
        line = {"part": part, "leaves": entries, "facts": facts, "outcomes": outcomes}
        with open(self.file, "a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
            out.flush()
            os.fsync(out.fileno())
        self.leaves[part], self.facts[part] = leaves, facts
        self.outcomes |= outcomes

    def _lines(self) -> tuple[bool, list[dict[str, Any]]]:
        """The lines of the journal, and whether the last was written whole (a killed process may tear it)."""
        try:
            *lines, rest = self.file.read_text(encoding="utf-8", errors="replace").split("\n")
        except FileNotFoundError:
            return True, []
        try:
            return not rest, [json.loads(line) for line in lines]
        except ValueError as error:
            raise OutputExistsError(
                f"{self.file} is damaged ({error}), so what the folder holds is unknown. Nothing was touched; "
                "convert to another folder, or delete this one yourself"
            ) from None

    def _rewrite(self, lines: list[dict[str, Any]]) -> None:
        temporary = self.file.with_suffix(".tmp")
        with open(temporary, "w", encoding="utf-8") as out:
            out.writelines(json.dumps(line) + "\n" for line in lines)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, self.file)
        sync_folder(self.file.parent)
