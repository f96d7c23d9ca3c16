"""Run every notebook's .py file and write its .ipynb with outputs: `python tests/refresh_notebooks.py`."""

from pathlib import Path

import jupytext
import nbclient
import nbformat

for source in sorted((Path(__file__).parent.parent / "notebooks").glob("*.py")):
    notebook = jupytext.read(source)
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    nbformat.write(notebook, source.with_suffix(".ipynb"))
    print(source.with_suffix(".ipynb").name)
