"""The notebooks run, and each pair of .py and .ipynb has the same cells."""

import re
from pathlib import Path

import jupytext
import nbclient
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    """The other tests have notebooks to run over."""
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_pair(path):
    """The .py file holds the same cells as the .ipynb file."""
    cells = [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]
    assert cells == [(cell.cell_type, cell.source) for cell in jupytext.read(path.with_suffix(".py")).cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_needs_only_what_is_installed(path):
    """Modules and files of a checkout are not there where a wheel is installed, or Jupyter opens another folder."""
    text = path.with_suffix(".py").read_text(encoding="utf-8")
    imported = set(re.findall(r"^(?:import|from) ([a-z0-9_]+)", text, re.MULTILINE))
    assert not imported & {"convert", "configs", "tests"} and "../" not in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell(path):
    """It asks a question, says how to run on the real checkpoint and what that takes, and, where something is found,
    what a rule fixes and what was chosen."""
    first = jupytext.read(path).cells[0].source
    assert re.search(r"\*\*[A-Z][^*]*\?\*\*", first)
    real = first.partition("*For the real checkpoint* set `SOURCE`")[2]
    assert re.search(r"\d GB", real)
    chosen = "*Fixed by rule:*" in real and re.search(r"\*Chosen\s(by\shand,\sperhaps\s)?after\slooking:\*", real)
    assert chosen or path.stem == "1_quickstart"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("default")
def test_runs(path, pytestconfig, tmp_path):
    """Every cell runs within a minute, in any folder."""
    if not pytestconfig.getoption("--notebooks"):
        pytest.skip("--notebooks runs them")
    notebook = jupytext.read(path)
    anywhere = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3", resources=anywhere).execute()
