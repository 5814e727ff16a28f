"""What a page is made of, against the results that it is made from; the browser's half is in test_browser.py."""

import base64
import json
import re
import shlex
import zlib

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import undertow as ut
from undertow.cli import app
from undertow.page import contents
from undertow.page.explanations import cards_of_attribution, merged
from undertow.page.packing import PackedArrays


def unpacked(text, packed):
    """The page's script, in Python: deflated, all low bytes of bfloat16 and then all high ones."""
    raw = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
    if packed["kind"] == "uint8":
        return raw.reshape(packed["shape"])
    low, high = raw.reshape(2, -1).astype(np.uint32)
    return ((high << 24) | (low << 16)).view(np.float32).reshape(packed["shape"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(32, 3)
    )
    folder = tmp_path_factory.mktemp("runs") / "a run"
    measures = ["histogram", "channel-norm"]
    with ut.record(folder, net, sites="conv", measures=measures, diagnose=1) as recording:
        for _ in range(5):
            with recording.batch():
                net(torch.randn(4, 1, 10, 10)).square().sum().backward()
    return ut.Run(folder)


def test_packed_numbers_are_within_a_rounding_of_bfloat16():
    values = np.concatenate(
        [np.float32([0, -0.0, np.inf, -np.inf, 3e38, 1e-40]), np.random.default_rng(0).normal(size=999)]
    )
    arrays = PackedArrays()
    packed, of_nan = arrays.floats(values), arrays.floats([np.nan])
    back = unpacked(arrays.texts[0], packed)
    finite = np.isfinite(values)
    errors = np.abs(back[finite].astype(np.float64) - values[finite])
    assert np.all(errors <= (2.0**-8 + 2.0**-24) * np.abs(values[finite]) + 1e-40)
    assert np.array_equal(back[2:4], [np.inf, -np.inf])
    assert np.isnan(unpacked(arrays.texts[1], of_nan)).all()


def test_a_runs_numbers_are_those_that_its_own_methods_give(run):
    arrays = PackedArrays()
    page = contents([run], arrays, "title")
    (shown,) = page["gradients"]["runs"]
    q = page["gradients"]["q"]
    whole = {one.label: one for one in run.quantiles(q)}
    by_batch = run.quantiles(q, by=("epoch", "batch"))
    assert [layer["label"] for layer in shown["layers"]] == ["0", "3"]
    assert shown["batches"] == 5
    for layer in shown["layers"]:
        assert layer["quantiles"] == list(whole[layer["label"]].values)
        assert layer["zeros"] == whole[layer["label"]].zeros / whole[layer["label"]].count
        course = unpacked(arrays.texts[layer["course"]["array"]], layer["course"])
        expected = [one.values for one in by_batch if one.site == layer["site"]]
        assert np.allclose(course, expected, rtol=2.0**-7.9)
        rows = [row for row in run.table("channel_norm").to_pylist() if row["site"] == layer["site"]]
        channels = unpacked(arrays.texts[layer["channels"]["array"]], layer["channels"])
        assert np.allclose(channels, np.mean([row["values"] for row in rows], 0), rtol=2.0**-7.9)


def test_a_histogram_in_octaves_counts_what_was_recorded(run):
    (shown,) = contents([run], PackedArrays(), "title")["gradients"]["runs"]
    for layer in shown["layers"]:
        rows = [row for row in run.table("histogram").to_pylist() if row["site"] == layer["site"]]
        expected: dict[tuple[str, int], int] = {}
        zeros = 0
        for row in rows:
            for code, count in zip(row["codes"], row["counts"], strict=True):
                value = np.uint32(code << 16).view(np.float32)
                if value == 0:
                    zeros += count
                    continue
                key = ("negative" if value < 0 else "positive", int(np.floor(np.log2(np.abs(value)))))
                expected[key] = expected.get(key, 0) + count
        histogram = layer["histogram"]
        got = {
            (sign, histogram["low"] + i): count
            for sign in ("negative", "positive")
            for i, count in enumerate(histogram[sign])
            if count
        }
        assert got == expected
        assert histogram["zeros"] == zeros


def test_the_flow_of_a_watched_run_is_which_site_reads_which(run):
    (graph,) = contents([run], PackedArrays(), "title")["flow"]
    assert [(edge["source"], edge["target"]) for edge in graph["edges"]] == [("0", "3"), ("3", "E")]
    rows = [row["norm"] for row in run.table("diagnosis").to_pylist() if row["site"] == "0" and row["step"] == 0]
    assert graph["edges"][0]["norm"] == pytest.approx(sum(rows) / len(rows))


def test_names_are_data_and_never_markup(tmp_path):
    hostile = "</script><img src=x onerror=alert(1)>[red]"
    path = ut.report(ut.Text([hostile, "\u2028"], [1.0, -1.0], title=hostile), path=tmp_path / "p.html", title=hostile)
    text = path.read_text(encoding="utf-8")
    assert "<img" not in text
    assert text.count("</script>") == text.count("<script")
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
    assert json.loads(data)["text"][0]["tokens"] == [hostile, "\u2028"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ([], "there is nothing to show"),
        ([3], "a int has no place in a page"),
        (["nowhere"], "nowhere is not there"),
        ([ut.Text(["a"], [1.0, 2.0])], "values of shape (2,) are not one for each of 1 tokens"),
        ([ut.Text(["a"], [float("nan")])], "NaN or infinity"),
    ],
)
def test_what_cannot_be_shown_is_one_line_and_writes_nothing(tmp_path, what, message):
    with pytest.raises(ut.InputError, match=re.escape(message)):
        ut.report(*what, path=tmp_path / "p.html")
    assert not list(tmp_path.iterdir())


def test_a_damaged_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    for text in (
        "{}",
        "[1",
        '{"photograph": 3}',
        '{"photograph": "a", "rules": {"g": 1}, "targets": [], "preprocessing": {}}',
    ):
        (tmp_path / "x" / "result.json").write_text(text)
        with pytest.raises(ut.InputError, match=r"result\.json is not as undertow writes it"):
            ut.report(tmp_path / "x", path=tmp_path / "p.html")


def test_rules_estimators_and_verdicts_of_one_photograph_stand_in_one_place(tmp_path):
    classifier = ut.load("demo")
    cat = ut.images.demo_photographs()["chelsea"]
    x = classifier.prepare(cat)
    view = classifier.preprocessing.view(ut.images.read(cat))
    cards = [
        {**card, "name": "cat.png", "photograph": view, "made": {"weights_sha256": "0" * 64}}
        for options in ({"rule": "guided", "target": [[285, 281]]}, {"rule": "gradient", "target": 281})
        for card in cards_of_attribution(ut.explain(classifier.module, x, **options), classifier.classes)
    ]
    other = {**cards[0], "made": {"weights_sha256": "1" * 64}}
    joined, alone = merged([*cards, cards[0], other])
    assert [(one["key"], joined["targets"][one["target"]]["name"]) for one in joined["maps"]] == [
        ("guided", "Egyptian cat"),
        ("guided", "tabby"),
        ("gradient", "tabby"),
    ]
    assert len(alone["maps"]) == 2


def test_a_page_shows_no_file_that_a_folder_only_links_to(tmp_path):
    folder = tmp_path / "x"
    assert CliRunner().invoke(app, ["explain", str(ut.images.demo_photographs()["coffee"]), "--model", "demo",
                                    "--rule", "gradient", "--out", str(folder)]).exit_code == 0  # fmt: skip
    (result,) = folder.iterdir()
    assert ut.report(folder, path=tmp_path / "p.html").stat().st_size > 100_000
    for name in ("photograph.png", "gradient.safetensors"):
        (result / name).rename(tmp_path / name)
        (result / name).symlink_to(tmp_path / name)
        with pytest.raises(ut.InputError, match=f"{name} is a link"):
            ut.report(folder, path=tmp_path / "q.html")
        (result / name).unlink()
        (tmp_path / name).rename(result / name)


def test_a_page_tells_the_command_that_made_it(run, tmp_path):
    path = tmp_path / "a page.html"
    words = ["report", str(run.folder), "-o", str(path), "--title", "<b> it's"]
    assert CliRunner().invoke(app, words).exit_code == 0
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), re.S)
    facts = next(one["facts"] for one in json.loads(data)["made"] if one["title"] == "this page")
    assert shlex.split(facts["command"]) == ["undertow", *words]


def test_a_page_replaces_no_file_of_another_kind(tmp_path):
    photograph = tmp_path / "cat.png"
    photograph.write_bytes(b"mine")
    with pytest.raises(ut.InputError, match=r"cat\.png must end in \.html"):
        ut.report(ut.Text(["a"], [1.0]), path=photograph)
    record = ["record", str(tmp_path), "--model", "demo", "--out", str(tmp_path / "run"), "--report"]
    for words in (["report", str(tmp_path), "-o"], ["explain", str(photograph), "--model", "demo", "--report"], record):
        done = CliRunner().invoke(app, [*words, str(photograph)])
        assert isinstance(done.exception, ut.InputError)
        assert "must end in .html" in str(done.exception)
    assert photograph.read_bytes() == b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["cat.png"]
