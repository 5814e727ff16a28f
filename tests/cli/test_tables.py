"""Tables in terminals of any width: words wrap, columns go below, and no number is cut or broken."""

import json
import re

import pytest
import torch
from torch import nn

import undertow as ut
from undertow.cli import main, printing

NUMBERS = [["7.957e-06", "4,816,896", "100.0%"], ["0.0001311", "12,845,056", "0.0%"], ["nan", "0", "43.9%"]]
NAMES = ["conv", "_blocks.14._depthwise_conv", "a" * 70]


def call(capsys, *words):
    with pytest.raises(SystemExit) as excinfo:
        main([*map(str, words)])
    captured = capsys.readouterr()
    return excinfo.value.code, captured.out, captured.err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Fourteen convolutions behind ReLUs."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    torch.manual_seed(1)
    layers = [m for i in range(14) for m in (nn.Conv2d(2 if i else 1, 2, 3, padding=1), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(72, 3))
    with ut.record(folder, net, sites="conv", measures=["histogram"]) as recording, recording.batch():
        net(torch.rand(3, 1, 6, 6)).sum().backward()
    return folder


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 200])
def test_numbers_are_whole_in_any_width(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    rows = [[name, *numbers] for name, numbers in zip(NAMES, NUMBERS, strict=True)]
    printing.print_table(("site", "median", "values", "zeros"), rows, right=("median", "values", "zeros"))
    out = capsys.readouterr().out
    assert "…" not in out
    words = out.split()
    for number in (number for row in NUMBERS for number in row):
        assert number in words
    if width >= 60:
        assert max(map(len, out.splitlines())) <= width
    assert "_blocks.14._depthwise_conv" in words


def test_columns_without_room_go_below_with_the_names_again(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    headings = ("site", "5 %", "50 %", "95 %")
    printing.print_table(headings, [("features.10", "0.0001", "0.0002", "0.0003")], right=headings[1:], bold=[0])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["site", "5", "%", "50", "%"],
        ["features.10", "0.0001", "0.0002"],
        [],
        ["site", "95", "%"],
        ["features.10", "0.0003"],
    ]


def test_a_remedy_keeps_its_extra_in_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    remedy = 'needs two packages; run: pip install "undertow[demo]" once'
    printing.print_table(("reference", "offline", "why"), [("demo", "no", remedy)])
    assert re.sub(r"\s", "", remedy) in re.sub(r"\s", "", capsys.readouterr().out)


def test_models_are_listed_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    rows = json.loads(call(capsys, "models", "resnet", "--json")[1])
    code, out, _ = call(capsys, "models", "resnet")
    assert code == 0
    words = out.split()
    assert "…" not in out
    for row in rows:
        assert row["reference"] in words or len(row["reference"]) > 32


@pytest.mark.parametrize("words", [(), ("--from", ".5", "--to", ".9", "--step", ".2")])
@pytest.mark.parametrize("width", [50, 80, 300])
def test_quantiles_are_all_there(capsys, monkeypatch, run, words, width):
    monkeypatch.setenv("COLUMNS", str(width))
    rows = json.loads(call(capsys, "quantiles", run, *words, "--json")[1])
    code, out, _ = call(capsys, "quantiles", run, *words)
    assert code == 0
    assert "…" not in out
    printed = set(out.split())
    for row in rows:
        assert {row["site"], f"{row['zeros'] / row['count']:.1%}"} <= printed
        assert {f"{value:.4g}" for name, value in row.items() if re.fullmatch(r"p\d+", name)} <= printed


@pytest.mark.parametrize("words", [(), ("--from", ".5", "--to", ".9", "--step", ".2")])
def test_runs_with_long_names_are_compared_in_80_columns(capsys, monkeypatch, run, tmp_path, words):
    monkeypatch.setenv("COLUMNS", "80")
    other = tmp_path / ("a_run_with_a_rather_long_name_" * 3)
    other.symlink_to(run)
    rows = json.loads(call(capsys, "compare", run, other, *words, "--json")[1])
    code, out, _ = call(capsys, "compare", run, other, *words)
    assert code == 0
    assert "…" not in out
    printed = set(out.split())
    names = ["p50", "p70", "p90"] if words else ["p5", "p50", "p95"]
    assert {f"{row[name]:.4g}" for row in rows for name in names} <= printed


def test_panels_and_ground_of_a_figure(capsys, run, tmp_path):
    words = ("quantiles", run, "--from", ".5", "--to", ".9", "--step", ".2")
    for more in (("--panels", "layer", "--ground", "dark"), ("--panels", "quantile", "--ground", "transparent")):
        file = tmp_path / f"{more[1]}.svg"
        assert call(capsys, *words, "--plot", file, *more)[0] == 0
        assert file.read_text().count('id="axes_') == {"layer": 14, "quantile": 3}[more[1]]
    code, out, err = call(capsys, *words, "--panels", "layer")
    assert (code, out) == (2, "")
    assert "name its file, as in --plot" in err
    code, out, err = call(capsys, *words, "--plot", tmp_path / "a.jpg")
    assert (code, out) == (2, "")
    assert "must end in .png, .svg or .pdf" in err
