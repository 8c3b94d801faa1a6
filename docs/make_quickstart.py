"""Write `docs/quickstart.ipynb` again with its outputs: python docs/make_quickstart.py."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

PAGE = Path(__file__).parent / "quickstart.ipynb"


def executed(folder: Path, last: str = "") -> Any:
    """The notebook after all its cells ran, and the code in `last`, in a kernel that works in `folder`."""
    notebook = nbformat.read(PAGE, as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(last)] if last else []
    for cell in notebook.cells:
        cell.metadata.clear()
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.record_timing = False
    client.execute()
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(executed(Path(folder)), PAGE)
