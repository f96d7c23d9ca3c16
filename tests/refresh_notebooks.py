"""Run every notebook's .py file and write its .ipynb with outputs: `python tests/refresh_notebooks.py`."""

from pathlib import Path

import jupytext
import nbclient
import nbformat


def clean_outputs(outputs: list) -> list:
    """Return outputs without stderr, consecutive text merged."""
    kept: list = []
    for output in outputs:
        if output.output_type == "stream" and output.name == "stderr":
            continue
        if kept and output.output_type == kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


for source in sorted((Path(__file__).parent.parent / "notebooks").glob("*.py")):
    notebook = jupytext.read(source)
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = clean_outputs(cell.outputs)
    nbformat.write(notebook, source.with_suffix(".ipynb"))
    print(source.with_suffix(".ipynb").name)
