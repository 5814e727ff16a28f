"""`undertow compare`: which run is spoken of, each quantile's ratio, and curves that are one."""

import csv
import json

import numpy as np
import pytest
import torch
from torch import nn

import undertow as ut
from undertow.cli import main
from undertow.diagnosis import coincidences, contrast


def network(norm, seed):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 4, 3), *([nn.BatchNorm2d(4)] if norm else []), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 3))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two networks, of which the second has batch norm; their gradient at the scores is the same by the objective."""
    folder = tmp_path_factory.mktemp("runs")
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)).abs()
    for name, norm in (("plain", False), ("normed", True)):
        sites = lambda _, module: isinstance(module, nn.Conv2d | nn.Linear)  # noqa: E731
        with (
            ut.record(
                folder / name, network(norm, 1), sites=sites, measures="histogram", diagnose=1, objective="label"
            ) as recording,
            recording.batch(),
        ):
            recording.model(x)[:, 1].sum().backward()
    return folder / "plain", folder / "normed"


def call(capsys, *words):
    with pytest.raises(SystemExit) as excinfo:
        main(["compare", *map(str, words)])
    captured = capsys.readouterr()
    return excinfo.value.code, captured.out, captured.err


@pytest.mark.parametrize("order", [1, -1])
def test_each_sentence_names_the_run_that_it_speaks_of(order, runs):
    """In either order it is the second network that has batch norm, behind its first convolution."""
    sentences = contrast([ut.Run(run) for run in runs[::order]])
    (sentence,) = (one for one in sentences if one.startswith("batch_norm"))
    assert sentence.startswith("batch_norm after '0' of normed subtracts")
    assert sentence.endswith("at '0' of plain, which has none")


def test_runs_of_one_name_are_told_apart_by_their_folders(runs, tmp_path):
    (tmp_path / "plain").symlink_to(runs[1])
    sentences = contrast([ut.Run(runs[0]), ut.Run(tmp_path / "plain")])
    assert any(str(tmp_path / "plain") in sentence for sentence in sentences)


def test_curves_that_are_one_are_said_to_be_and_why(runs, capsys):
    pair = [ut.Run(run) for run in runs]
    (sentence,) = coincidences(pair, ut.compare(pair))
    assert sentence.startswith("the curves of plain and normed are one at ")
    assert "objective is a score" in sentence
    (one,) = coincidences([pair[0], pair[0]], ut.compare([pair[0], pair[0]]))
    assert one.endswith("they are one run")
    code, out, _ = call(capsys, *runs)
    assert code == 0
    assert sentence in out


def test_each_quantile_that_is_asked_for_is_printed_with_its_ratio(runs, capsys, tmp_path):
    code, out, _ = call(capsys, *runs, "--from", ".2", "--to", ".8", "--step", ".3", "--csv", tmp_path / "c.csv")
    assert code == 0
    assert "nan" not in out
    rows = [line.split() for line in out.splitlines() if " % " in line]
    assert len(rows) >= 9
    values = {name: ut.Run(run).quantiles([0.2, 0.5, 0.8])[0].values for name, run in zip("ab", runs, strict=True)}
    expected = [
        f"{b / a:.4g}" if a else "both 0" if b == 0 else "from 0" for a, b in zip(*values.values(), strict=True)
    ]
    for line, ratio in zip([line for line in out.splitlines() if "%" in line][:3], expected, strict=True):
        assert line.rstrip().endswith(ratio)
    table = list(csv.DictReader((tmp_path / "c.csv").read_text().splitlines()))
    assert {"p20", "p50", "p80", "ratio_p20", "ratio_p50", "ratio_p80", "ratio_of_medians"} <= table[0].keys()
    assert not {"p5", "p95"} & table[0].keys()


def test_a_zero_is_said_and_never_nan(runs, capsys):
    code, out, _ = call(capsys, *runs)
    assert code == 0
    assert "nan" not in out.replace("nansense", "")
    assert "both 0" in out  # at the scores two of three gradients are zero in both
    _, printed, _ = call(capsys, *runs, "--json")
    rows = json.loads(printed)
    medians = [row["ratio_of_medians"] for row in rows if row["run"].endswith("normed")]
    first, second = (ut.Run(run).quantiles([0.5]) for run in runs)
    for ratio, a, b in zip(medians, first, second, strict=True):
        a, b = a.values[0], b.values[0]
        assert ratio == (None if a == 0 else pytest.approx(b / a))
    assert np.isfinite([ratio for ratio in medians if ratio is not None]).all()


def test_a_range_that_is_none_is_refused(runs, capsys):
    code, _, err = call(capsys, *runs, "--from", ".9", "--to", ".5")
    assert code == 2
    assert "exchange them" in err
