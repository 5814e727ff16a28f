"""Run notebooks and keep their outputs in them: `python docs/notebooks/execute.py`, or with their files behind it."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbclient
import nbformat

FOLDER = Path(__file__).parent


def executed(path: Path, folder: str) -> Any:
    """Return a notebook with fresh outputs; its cells run in a process of their own, in a folder.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raises.
    """
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": folder}})
    client.execute(env={**os.environ, "OMP_NUM_THREADS": "1"})  # threads that spin slow each other down on few cores
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran, which differs each time
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output.data.pop("image/jpeg", None)  # Pillow's pictures come as both
    notebook.metadata["language_info"] = {"name": "python"}  # not the version of this machine's Python
    return notebook


if __name__ == "__main__":
    for path in [Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(executed(path, folder), path)
        print(f"{path.name}: {path.stat().st_size:,} bytes")
