"""The proof by planted mistakes stays applicable: `python -m tests.mutations` runs it."""

import ast
import json
from pathlib import Path

from tests import edit_mistakes, golden, mutations

DATA = Path(__file__).parent / "data"


def test_every_replacement_applies():
    """Each text to be replaced occurs exactly once, and what comes of it is Python."""
    assert mutations.misfits() == mutations.misfits(edit_mistakes.MISTAKES) == []


def test_every_named_test_exists():
    """A mistake is looked for by tests that are there, on cases that are there."""
    names = {case.name for case in golden.cases(DATA)}
    for planted in (*mutations.MISTAKES, *edit_mistakes.MISTAKES):
        for test in planted.tests:
            file, _, function = test.partition("::")
            function, _, case = function.partition("[")
            tree = ast.parse((mutations.REPOSITORY / file).read_text())
            assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test
            assert not case or case.rstrip("]") in names, test


def test_every_mistake_of_the_tables_is_planted():
    """What the golden sets list as typical mistakes, and the two of the MTP layer."""
    listed = {"mtp_prenorm_hidden", "mtp_eh_order"}
    for folder in golden.cases(DATA):
        check = json.loads((folder / "README.json").read_text())["cross_check"]
        listed |= set(check.get("mutations_f64", {})) | set(check.get("mistakes", {}))
    listed = {name for name in listed if not name.startswith("info_")}
    assert listed == {planted.name for planted in mutations.MISTAKES}
    assert len(listed) == len(mutations.MISTAKES) == 47
