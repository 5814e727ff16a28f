"""The notebooks run, and what stands in them, kept and fresh, is looked at."""

import re
import subprocess
import sys
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import nbformat
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
LARGEST = 500_000  # bytes of a notebook with its outputs
KINDS = {"text/plain", "text/html", "text/latex", "image/png"}


class Elements(HTMLParser):
    """Notes elements and where their pictures come from."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes


def kinds(notebook) -> list[list[set[str]]]:
    """Return for each cell of code the kinds of each of its outputs."""
    return [[set(o.get("data", {})) for o in cell.outputs] for cell in notebook.cells if cell.cell_type == "code"]


def check_picture(data: bytes) -> None:
    with Image.open(BytesIO(data)) as picture:
        picture.load()
        assert min(picture.size) >= 32
        grey = picture.convert("L")
        low, high = grey.getextrema()
        assert high - low > 60, "a picture is blank"
        assert len(grey.getcolors(256)) > 8


def check_outputs(notebook) -> None:
    """Every cell that ends in an expression shows something richer than text, static and small."""
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        for output in cell.outputs:
            assert output.output_type == "execute_result", output
            data = output.data
            assert {"text/plain"} < set(data) <= KINDS
            assert len(data["text/plain"]) < 2_000
            for picture in [data["image/png"]] if "image/png" in data else []:
                check_picture(b64decode(picture))
            html = data.get("text/html", "")
            elements = Elements(html)
            assert not {"script", "style", "link", "iframe", "object"} & set(elements.tags)
            assert not [name for name, _ in elements.attributes if name.startswith("on") or name == "href"]
            for source in (value for name, value in elements.attributes if name == "src"):
                assert source.startswith("data:image/png;base64,")
                check_picture(b64decode(source.partition(",")[2]))
            formula = data.get("text/latex", "$$")
            assert formula[0] == formula[-1] == "$"
            assert formula.count("{") == formula.count("}")


def test_there_is_a_notebook():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_what_stands_in_a_notebook_can_be_seen_without_running_it(path):
    notebook = nbformat.read(path, as_version=4)
    check_outputs(notebook)
    assert path.stat().st_size < LARGEST
    text = path.read_text()
    assert not re.search(r"/(home|root|tmp|work|usr)/", text), "a path of somebody's machine"
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "cells were not run in order; run execute.py"
    shown = [cell for cell in kinds(notebook) if cell]
    assert {kind for cell in shown for output in cell for kind in output} == KINDS


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_and_shows_what_it_showed(path, tmp_path):
    fresh = tmp_path / path.name
    fresh.write_bytes(path.read_bytes())
    script = ROOT / "docs" / "notebooks" / "execute.py"
    done = subprocess.run([sys.executable, script, fresh], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    ran = nbformat.read(fresh, as_version=4)
    check_outputs(ran)
    assert kinds(ran) == kinds(nbformat.read(path, as_version=4))
    assert fresh.stat().st_size < LARGEST
