"""The notebooks run, and each pair of .py and .ipynb has the same cells."""

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
@pytest.mark.filterwarnings("default")
def test_runs(path, pytestconfig):
    """Every cell runs within a minute."""
    if not pytestconfig.getoption("--notebooks"):
        pytest.skip("--notebooks runs them")
    notebook = jupytext.read(path)
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
