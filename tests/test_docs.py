"""The documentation is tested: every code block runs, every command line parses, every public name is there."""

import re
import shlex
from pathlib import Path

import click
import duckdb
import pytest

import undertow as ut
from undertow.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = sorted({line for page in PAGES for line in re.findall(r"^\s*(undertow .*)$", page.read_text(), re.M)})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(compile(block, str(page), "exec"), space)


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
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), (page.name, link)


def test_every_public_name_has_a_docstring():
    for name in ut.__all__:
        assert getattr(ut, name).__doc__, name
        assert name in dir(ut)


def test_the_version_is_the_packages():
    assert f'version = "{ut.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_the_readmes_query_reads_a_run(tmp_path):
    page = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    space: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), space)
    (query,) = re.findall(r"`(SELECT [^`]*)`", page)
    found = duckdb.sql(query.replace("RUN", str(space["folder"]))).fetchall()
    assert {site for site, _ in found} == {"1", "3"}
    assert all(0 <= share <= 1 for _, share in found)
