"""The documentation is tested: every block of Python and shell runs, links lead somewhere, public names are there."""

import re
import shlex
import shutil
from runpy import run_path

import click
import duckdb
import pytest

import undertow as ut
from documented import PAGES, ROOT, blocks_of, furnish, furnish_keras, is_run, lines_of, run_line, run_page
from undertow.cli import app

COMMANDS = sorted({line for page in PAGES for line in re.findall(r"^\s*(undertow .*)$", page.read_text(), re.M)})
SHELL = sorted({line for page in PAGES for _, block in blocks_of(page, "sh") for line in lines_of(block)})
WITH_THE_DEMO = ("undertow explain cat.jpg --model demo --target top:3", "undertow trace --model demo")
SLOW = {"keras.md", "jax.md"}  # importing another framework takes longer than all the rest


@pytest.fixture(scope="module")
def furnished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documented")
    furnish(folder)
    return folder


@pytest.fixture
def folder(furnished, tmp_path, monkeypatch):
    """A fresh copy of the folder in which all blocks of a page run."""
    shutil.copytree(furnished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def marked(page):
    return pytest.param(page, marks=[pytest.mark.slow] if page.name in SLOW else [], id=str(page.relative_to(ROOT)))


@pytest.mark.parametrize("page", [marked(page) for page in PAGES if page.parent.name != "course"])
def test_every_block_of_a_page_runs(page, folder):
    if any("keras" in line for _, block in blocks_of(page, "sh") for line in lines_of(block)):
        furnish_keras(folder)
    run_page(page)


@pytest.mark.slow
@pytest.mark.parametrize("line", WITH_THE_DEMO)
def test_lines_run_with_the_demo_network_itself(line, folder):
    assert line in SHELL
    run_line(line, stand_ins=False)


def test_every_line_of_shell_is_run_somewhere():
    assert [line for line in SHELL if is_run(line) and not line.startswith("undertow ")] == []


@pytest.mark.parametrize("line", COMMANDS)
def test_command_lines_parse(line):
    words = shlex.split(line, comments=True)[1:]
    command = app.commands[words[0]]
    with command.make_context(words[0], words[1:]) as context:
        assert isinstance(context, click.Context)


def test_there_are_commands_to_test():
    assert len(COMMANDS) >= 5


def test_links_lead_somewhere():
    for page in PAGES:
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", prose):
            assert (page.parent / link).exists(), (page.name, link)


def test_drawings_are_what_their_script_draws():
    script = run_path(str(ROOT / "docs" / "drawings.py"))
    kept = {path.stem: path.read_text() for path in (ROOT / "docs" / "concepts").glob("*.svg")}
    assert kept == {name: draw().svg() for name, draw in script["DRAWINGS"].items()}, "run docs/drawings.py"


def test_every_public_name_has_a_docstring():
    for name in ut.__all__:
        assert getattr(ut, name).__doc__, name
        assert name in dir(ut)


def test_the_version_is_the_packages():
    assert f'version = "{ut.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_the_query_of_the_page_on_recording_reads_a_run(folder):
    page = ROOT / "docs" / "record.md"
    names = run_page(page)
    (query,) = re.findall(r"`(SELECT [^`]*)`", page.read_text())
    rows = duckdb.sql(query.replace("RUN", str(names["folder"]))).fetchall()
    assert {site for site, _ in rows} == {"1", "3"}
    assert all(0 <= share <= 1 for _, share in rows)
