"""What a release promises: versions that are tried, a typed package, remedies that work, archives with all in them."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import release
import tries
import versions

import undertow
from undertow.environment import PURPOSES
from undertow.errors import FrameworkError
from undertow.frameworks.base import capability
from undertow.installing import install_command

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_floor_is_a_version_and_every_extra_is_tried():
    assert len(versions.floors()) > 10
    extras = {extra for extra in PROJECT["optional-dependencies"] if extra not in ("dev", "bench")}
    assert set(tries.TRIES) - {""} == extras
    assert set(PURPOSES) == extras


def test_the_version_stands_in_three_places():
    assert PROJECT["version"] == undertow.__version__
    assert f"version: {undertow.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_classifiers_name_the_pythons_that_are_tried():
    named = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)}
    assert named == set(release.TRIED)
    assert PROJECT["requires-python"] == f">={min(named, key=lambda v: int(v[2:]))}"


def test_one_function_says_how_an_extra_is_installed():
    for path in (ROOT / "src").rglob("*.py"):
        if path.name != "installing.py":
            written = re.findall(r"install .?\"undertow\[(?!name\])", path.read_text())
            assert not written, f"{path}: take installing.install_command"
        for extra in re.findall(r"install_command\(\"(\w+)\"\)", path.read_text()):
            assert extra in PURPOSES, f"{path} names an extra that there is not"


@pytest.mark.slow
def test_a_remedy_leaves_an_installed_checkout_as_it_is():
    """pip itself answers what it would do, with no index to ask: every extra is there where the tests run."""
    words = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--quiet", "--report", "-"]
    for extra in PURPOSES:
        named = install_command(extra).removeprefix('pip install "').removesuffix('"')
        done = subprocess.run([*words, named], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["install"] == [], extra


def test_what_keras_brings_is_missed_by_name(monkeypatch):
    """As in an environment without Keras, where `undertow models` broke off at `import h5py`."""
    monkeypatch.setitem(sys.modules, "h5py", None)
    monkeypatch.delitem(sys.modules, "undertow.frameworks.keras.zoo", raising=False)
    with pytest.raises(FrameworkError, match="h5py is not installed; run: pip install"):
        capability("keras", "zoo")


@pytest.mark.slow
def test_a_consumer_passes_mypy_strict(tmp_path):
    """Under the package's own typing alone: in a folder without this project's settings."""
    right = (ROOT / "tests" / "consumer" / "consumer.py").read_text()
    (tmp_path / "right.py").write_text(right)
    (tmp_path / "wrong.py").write_text(right.replace("a.rewired", "a.rewird"))
    # of torch and the like only the names: to read their sources takes most of the time, and they are not ours
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = True\n[mypy-torch.*,keras.*,jax.*]\nfollow_imports = skip\n")
    words = ["--follow-imports=silent", "--no-incremental", "right.py", "wrong.py"]
    done = subprocess.run([sys.executable, "-m", "mypy", *words], cwd=tmp_path, capture_output=True, text=True)
    assert "right.py" not in done.stdout, done.stdout
    assert re.search(r'wrong.py:\d+: error: .*has no attribute "rewird"', done.stdout), done.stdout + done.stderr


def test_each_cell_of_the_features_names_a_test_that_exists():
    page = (ROOT / "docs" / "features.md").read_text()
    shown = dict(re.findall(r"^(\d+)\. `(tests/\S+::\w+)`$", page, re.M))
    rows = [row.split("|")[1:-1] for row in re.findall(r"^\|.*\|$", page, re.M)]
    cells = [row[1].strip() for row in rows if not row[0].startswith("-") and row[0].strip()]
    assert len(cells) > 30
    for cell in cells:
        number = re.fullmatch(r"yes \[(\d+)\]", cell)
        assert number or cell in ("no", "part", "six questions"), cell
        assert number is None or number[1] in shown, cell
    for place in shown.values():
        path, name = place.split("::")
        assert f"def {name}(" in (ROOT / path).read_text(), place
