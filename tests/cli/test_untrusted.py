"""Names of others are shown, never obeyed; a network that ends the program is named; signals leave whole files."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import click
import pytest
from PIL import Image
from rich.console import Console

from cli.test_commands import call
from runs.damaging import small_run
from undertow import cli, models
from undertow.cli import printing
from undertow.cli.errors import error_line
from undertow.errors import InputError, ModelError, UndertowError, printable
from undertow.files import to_json
from undertow.runs import Run
from undertow.show.plots import quantile_panels, save

NASTY = ["[red]apple[/red]", "[/bold] pear", "\x1b[31mred", "two\nlines", "\udcff\x9b1m", ":smile: $x$ $", "猫 a"]
NETS = """
import torch
class Net(torch.nn.Module):
    def __init__(self, fails=None):
        super().__init__()
        self.conv, self.head, self.fails, self.calls = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 7), fails, 0
    def forward(self, x):
        self.calls += 1
        if self.fails and self.calls > 1:
            raise self.fails
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))
class Mute(Exception):
    def __str__(self):
        raise ValueError("no text")
def made(fails=None):
    torch.manual_seed(0)
    return {{"module": Net(fails), "preprocessing": {{"resize": 32, "crop": 32}}, "classes": {names!r}}}
def load(): return made()
def late_exit(): return made(SystemExit(0))
def late_interrupt(): return made(KeyboardInterrupt())
def late_mute(): return made(Mute())
def ends(): raise SystemExit(3)
def interrupts(): raise KeyboardInterrupt
def mutes(): raise Mute
def collects(): raise GeneratorExit
"""


@pytest.fixture
def nets(tmp_path) -> str:
    path = tmp_path / "nets.py"
    path.write_bytes(NETS.format(names=NASTY).encode())
    return str(path)


@pytest.fixture
def photographs(tmp_path) -> list[Path]:
    """Photographs of every kind of name that a file system takes."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    names = [os.fsdecode(name) for name in (b"caf\xe9.png", b"\x1b[31mred.png", b"[bold]x[red].png", b"two\nlines.png")]
    for name in names:
        with (folder / name).open("wb") as file:
            Image.new("RGB", (40, 40), "red").save(file, "PNG")
    return [folder / name for name in names]


def printed(*texts: str) -> str:
    return "".join(texts).replace("\n", "")


@pytest.mark.slow
def test_names_are_shown_and_all_photographs_explained(capfd, tmp_path, nets, photographs):
    code, out, err = call(capfd, "explain", photographs[0].parent, "--model", f"{nets}:load", "--out", tmp_path / "out",
                          "--target", "top:7", "--rule", "guided")  # fmt: skip
    assert code == 0, err
    for name in (*NASTY, *(path.name for path in photographs)):
        assert printable(name) in out
    assert "\x1b" not in out + err
    assert "\x9b" not in out + err
    assert len(list((tmp_path / "out").glob("*/result.json"))) == 4
    code, out, err = call(capfd, "explain", photographs[0].parent, "--model", f"{nets}:load", "--out", tmp_path / "out",
                          "--json", "--rule", "gradient")  # fmt: skip
    assert code == 0, err
    answers = json.loads(out)["results"]
    assert sorted(answer["photograph"] for answer in answers) == sorted(map(str, photographs))
    assert {p["name"] for p in answers[0]["predictions"]} <= set(NASTY)
    written = [json.loads((Path(answer["folder"]) / "result.json").read_text()) for answer in answers]
    assert [answer["photograph"] for answer in written] == [answer["photograph"] for answer in answers]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph")  # the font of charts has no 猫
def test_a_folder_of_such_names_is_recorded_and_checked(capfd, tmp_path, nets, photographs):
    run = tmp_path / "[bold]run$a$\x1b[31m"
    assert call(capfd, "record", photographs[0].parent, "--model", f"{nets}:load", "--out", run)[0] == 0
    for words in (["quantiles", run, "--plot", tmp_path / "q.png"], ["compare", run, run], ["check", run]):
        code, out, err = call(capfd, *words)
        assert (code, err) == (0, "")
        assert "\x1b" not in out
    assert printable(run.name) in out
    code, _, err = call(capfd, "trust", photographs[0], "--model", f"{nets}:load", "--out", tmp_path / "t")
    assert code == 0, err


@pytest.mark.slow
@pytest.mark.parametrize("function", ["ends", "interrupts", "mutes", "collects"])
def test_a_file_that_ends_the_program_is_named(capfd, tmp_path, nets, photographs, function):
    code, _, err = call(capfd, "explain", photographs[0], "--model", f"{nets}:{function}", "--out", tmp_path / "out")
    assert code == 2
    assert err.count("\n") == 1
    assert "nets.py failed in line" in err
    with pytest.raises(ModelError, match=r"nets.py failed in line \d+ with"):
        models.load(f"{nets}:{function}")


@pytest.mark.slow
@pytest.mark.parametrize("function", ["late_exit", "late_interrupt", "late_mute"])
def test_a_network_that_would_end_the_program_does_not(capfd, tmp_path, nets, photographs, function):
    code, _, err = call(capfd, "explain", *photographs, "--model", f"{nets}:{function}", "--out", tmp_path / "out")
    assert code == 2
    assert err.count("error: ") == 4
    assert "0 of 4 photographs explained" in err
    code, _, err = call(
        capfd, "record", photographs[0].parent, "--model", f"{nets}:{function}", "--out", tmp_path / "run"
    )
    assert code == (1 if function == "late_mute" else 2)
    assert err.count("error: ") == 1
    assert not Run(tmp_path / "run").finished


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_a_command_between_whole_files(tmp_path, nets, photographs, number, code):
    words = [sys.executable, "-m", "undertow", "explain", *map(str, photographs * 200), "--model", f"{nets}:load"]
    process = subprocess.Popen(
        [*words, "--out", str(tmp_path / "out")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("*/result.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "what was finished is complete" in err
    assert not list((tmp_path / "out").rglob(".*"))


def test_the_gate_shows_and_does_not_obey(capsys):
    console = Console(force_terminal=True, width=200)
    for name in NASTY:
        printing.echo(name)
        printing.echo_error(name)
        printing.print_line(console, name)
        printing.print_table([name], [[name]], title=name)
        printing.print_json({name: name})
    out, err = capsys.readouterr()
    assert err == "".join(f"error: {printable(name)}\n" for name in NASTY)
    for name in NASTY:
        assert out.count(printable(name)) >= 4
    plain = out.replace("\x1b[1m", "").replace("\x1b[0m", "").replace("\x1b[3m", "")
    assert "\x1b" not in plain
    assert "\x9b" not in plain


def test_what_click_says_is_shown_too(capsys):
    printing.echo_click_error(click.UsageError("no such \x1b[31m option"))
    assert capsys.readouterr().err.strip().endswith(r"no such \x1b[31m option")


def test_json_comes_back_as_it_was():
    value = {name: [name, 1.5, None, True] for name in NASTY}
    assert json.loads(to_json(value)) == value
    to_json(value).encode()
    assert json.loads(to_json([float("inf"), float("nan"), (1.0,)])) == [None, None, [1.0]]
    assert "猫" in to_json(value)


def test_an_encoding_that_lacks_letters_escapes_them(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "latin-1"))
    printing.print_anywhere()
    printing.echo("猫 →")
    sys.stdout.flush()
    assert raw.getvalue() == b"\\u732b \\u2192\n"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    printing.print_anywhere()


class Mute(Exception):
    def __str__(self):
        raise KeyboardInterrupt


def test_an_error_whose_text_fails_has_its_kind():
    error = Mute()
    error.add_note("while it ran")
    assert error_line(error) == "Mute: while it ran"
    assert error_line(Mute()) == "Mute"
    assert error_line(InputError("one two")) == "one two"
    assert error_line(ValueError("one\n two")) == "ValueError: one two"
    assert error_line(type("\x1b[31m", (Exception,), {})("x")) == r"\x1b[31m: x"


@pytest.mark.parametrize("kind", [UndertowError, *UndertowError.__subclasses__(), ModelError], ids=lambda k: k.__name__)
def test_every_error_is_one_line_whatever_names_stand_in_it(kind):
    for name in NASTY:
        assert str(kind(f"no layer {name}")) == f"no layer {printable(name)}"
    assert str(pickle.loads(pickle.dumps(kind("a\nb")))) == r"a\nb"


def test_only_the_gate_prints():
    """Each command prints through `printing`; bars and paddings of rich take what `shown` made."""
    for path in Path(printing.__file__).parent.glob("*.py"):
        if path.name != "printing.py":
            text = path.read_text()
            for word in ("click.echo", "json.dumps", "add_row", "add_column", "Text("):
                assert word not in text, f"{path.name}: {word}"


def test_names_in_charts_are_no_formulas(tmp_path):
    run = Run(small_run(tmp_path / "run"))
    for name in NASTY:
        groups = {name: run.quantiles([0.1, 0.5]), f"_{name}": run.quantiles([0.1, 0.5])}
        assert save(quantile_panels(groups, title=name), tmp_path / "a.png").exists()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="there is no folder that refuses everybody")
def test_a_disk_that_refuses_is_one_line_and_no_fault_of_ours(capfd, tmp_path):
    run = small_run(tmp_path / "run")
    for option, name in (("--csv", "/proc/q.csv"), ("--plot", "/proc/q.png")):
        code, _, err = call(capfd, "quantiles", run, option, name)
        assert code == 2
        assert err.count("\n") == 1
        assert f"'{name}'" in err


def test_check_says_what_is_lost(capfd, tmp_path):
    small_run(tmp_path / "a")
    small_run(tmp_path / "b")
    (tmp_path / "b" / "moments" / "part-000-000001.parquet").unlink()
    code, out, _ = call(capfd, "check", tmp_path / "a")
    assert code == 0
    assert f"{tmp_path / 'a'}: whole; 21 files with 3 batches read, finished" in out
    code, out, err = call(capfd, "check", tmp_path / "b")
    assert (code, err) == (2, "")
    assert "moments/part-000-000001.parquet is missing (1 batches); restore it" in out
    code, out, _ = call(capfd, "check", tmp_path / "b", "--json")
    assert code == 2
    found = json.loads(out)
    assert (found["whole"], found["faults"][0]["file"]) == (False, "moments/part-000-000001.parquet")
    code, _, err = call(capfd, "check", tmp_path)
    assert code == 2
    assert "is no run" in err


def test_a_warning_is_one_line_that_is_not_obeyed(capfd):
    with warnings.catch_warnings():
        warnings.showwarning = cli._show_warning
        warnings.simplefilter("always")
        warnings.warn("\x1b[31mred\n[bold]next", stacklevel=1)
    assert capfd.readouterr() == ("", "warning: \\x1b[31mred [bold]next\n")
