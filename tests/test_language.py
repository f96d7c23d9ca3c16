"""Size and language of the code: what a reader meets first."""

import ast
import collections
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
FILES = sorted([*(REPOSITORY / "dsv32_jax").rglob("*.py"), *(REPOSITORY / "convert").rglob("*.py")])

MOST_LINES, LINES_OF_A_FILE, LINES_OF_A_FUNCTION = 27_394, 300, 60

PARTICIPLES = frozenset(
    "absorbed announced asked attended begun blank called checked chosen collected compared converted cut described "
    "differing done drawn expected filled folded found given growing handled held hidden hushed kept known listed "
    "loaded made measured metered named noted occurring opened placed planned prepared printed raised read_back "
    "recorded recording restored resumed rewound resized said saved scored sealed seen shown spent spread stored "
    "clipped summed taken timed told touched used watched weighed written".split()
)
"""Participles that have been function names here. A function is a verb (`select`, `load_shard`); a property or an
argument may be a state."""


TREES = {file: ast.parse(file.read_text()) for file in FILES}
DEFINITIONS = [
    (file, node)
    for file, tree in TREES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
]
FUNCTIONS = [(file, node) for file, node in DEFINITIONS if not isinstance(node, ast.ClassDef)]


def name_of(file: Path) -> str:
    """The path of a file within the repository."""
    return str(file.relative_to(REPOSITORY))


def is_property(node: ast.AST) -> bool:
    """Whether a function is read like a field."""
    names = {ast.unparse(decorator).rpartition(".")[2] for decorator in getattr(node, "decorator_list", ())}
    return bool(names & {"property", "cached_property"})


def test_docstrings_say_what_is_done():
    """`Return the ...`, `Raise ...`, `A ...`: a docstring does not begin with `What`."""
    documented = [*TREES.items(), *DEFINITIONS]
    found = [(name_of(file), (ast.get_docstring(node) or "").partition("\n")[0]) for file, node in documented]
    assert not [(name, text) for name, text in found if text.startswith("What ")]


def test_functions_are_verbs():
    """No function is named by a bare participle."""
    functions = [(file, node) for file, node in FUNCTIONS if not is_property(node)]
    assert not [(name_of(file), node.name) for file, node in functions if node.name.lstrip("_") in PARTICIPLES]


def test_functions_and_files_are_short():
    """A file is one concept, a function fits on a screen."""
    files = {name_of(file): len(file.read_text().splitlines()) for file in FILES}
    assert not {name: lines for name, lines in files.items() if lines > LINES_OF_A_FILE}
    functions = [(name_of(file), node.name, (node.end_lineno or 0) - node.lineno + 1) for file, node in FUNCTIONS]
    assert not [found for found in functions if found[2] > LINES_OF_A_FUNCTION]


def test_a_file_name_says_where_one_is():
    """No file name occurs three times."""
    names = collections.Counter(file.name for file in FILES if file.name != "__init__.py")
    assert not {name for name, count in names.items() if count > 2}


def test_the_library_stays_small():
    """Library and converter together: 17,500 lines are the aim. A new feature deletes something first."""
    assert sum(len(file.read_text().splitlines()) for file in FILES) <= MOST_LINES


def test_the_checks_can_fail():
    """Each check sees the fault it is for."""
    text = 'def told(x):\n    """What is told."""\n\n\nclass A:\n    @property\n    def kept(self):\n        pass\n'
    told, a, kept = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.ClassDef))
    assert (told.name, is_property(told), is_property(kept), a.name) == ("told", False, True, "A")
    assert (ast.get_docstring(told) or "").startswith("What ")
