"""From a folder of photographs to quantiles, as a person types it."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch
from PIL import Image

import undertow as ut
from cli.test_commands import call
from undertow import images, models
from undertow.recording.photographs import record_photographs

pytestmark = pytest.mark.slow

NETWORK = """
import time, torch
class Net(torch.nn.Module):
    def __init__(self, norm):
        super().__init__()
        layers = []
        for i in range(3):
            layers += [torch.nn.Conv2d(3 if i == 0 else 4, 4, 3, stride=2)]
            layers += [torch.nn.BatchNorm2d(4)] * norm + [torch.nn.ReLU(inplace=True)]
        self.features = torch.nn.Sequential(*layers)
        self.head = torch.nn.Linear(4, 3)
    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))
def build(norm):
    torch.manual_seed(1)
    size = {"resize": 40, "crop": 32, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return {"module": Net(norm), "preprocessing": size, "classes": ["cat", "cup", "man"]}
def plain(): return build(0)
def normed(): return build(1)
def slow():
    net = build(0)
    def after(*_):
        time.sleep(0.4)
        with open(__file__ + ".passes", "a") as file:
            file.write("1")
    net["module"].register_forward_hook(after)
    return net
"""


@pytest.fixture
def network(tmp_path) -> str:
    path = tmp_path / "nets.py"
    path.write_text(NETWORK)
    return str(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twenty crops in two folders named after classes, and one that is broken."""
    root = tmp_path / "photographs"
    for label, name in (("cat", "chelsea"), ("cup", "coffee")):
        (root / label).mkdir(parents=True)
        picture = images.read(images.demo_photographs()[name])
        for i in range(10):
            picture.crop((10 * i, 5 * i, 10 * i + 120, 5 * i + 90)).save(root / label / f"{i}.png")
    (root / "cup" / "3b.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    return root


def test_record_quantiles_compare(capfd, tmp_path, network, folder):
    runs = {}
    for name in ("plain", "normed"):
        runs[name] = tmp_path / "runs" / name
        words = ("record", folder, "--model", f"{network}:{name}", "--sites", "conv[:2]", "--out", runs[name], "--json")
        code, out, err = call(capfd, *words, "--measure", "channel-norm", "--measure", "histogram", "--batch-size", 4)
        assert code == 2, err  # for the broken one, which is named
        assert "3b.png" in err
        assert json.loads(out)["photographs"] == 20
    run = ut.Run(runs["plain"])
    assert run.sites == ["features.0", "features.2"]
    assert run.manifest["source"]["photographs"] == 21
    table = run.table("channel_norm")
    assert table.num_rows == 40
    assert len(set(table["name"].to_pylist())) == 20

    code, out, _ = call(capfd, "quantiles", runs["plain"], "--csv", tmp_path / "q.csv", "--plot", tmp_path / "q.png")
    assert code == 0
    assert "50 %  <- median" in out
    with (tmp_path / "q.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["p50"]) for row in rows] == [one.values[0] for one in run.quantiles([0.5])]
    with Image.open(tmp_path / "q.png") as picture:
        assert picture.width > 300

    code, out, _ = call(capfd, "compare", *runs.values(), "--json", "--plot", tmp_path / "c.svg")
    assert code == 0
    rows = json.loads(out)
    assert [row["site"] for row in rows] == ["features.0", "features.0", "features.2", "features.3"]
    assert rows[1]["ratio_of_medians"] == pytest.approx(rows[1]["p50"] / rows[0]["p50"])
    norms = json.loads(call(capfd, "compare", *runs.values(), "--json", "--of", "channel-norm")[1])
    for row in norms:
        assert row["spread"] == (pytest.approx(row["p95"] / row["p5"]) if row["p5"] else None)
    assert (tmp_path / "c.svg").stat().st_size > 1000

    counts = duckdb.sql(
        f"SELECT site, count(*) FROM '{runs['plain']}/channel_norm/*.parquet' GROUP BY site ORDER BY site"
    )
    assert counts.fetchall() == [("features.0", 20), ("features.2", 20)]


@pytest.mark.parametrize("objective", ["predicted", "label", "loss"])
def test_each_image_has_its_own_gradient(tmp_path, network, folder, objective):
    """Against batches of one, hooks by hand."""
    classifier = models.load(f"{network}:plain")
    record_photographs(classifier, folder, tmp_path / "run", sites="conv[0]", objective=objective, batch_size=8)
    assert all(p.requires_grad and p.grad is None for p in classifier.module.parameters())
    rows = ut.Run(tmp_path / "run").table("channel_norm").to_pylist()
    assert len(rows) == 20
    net = models.load(f"{network}:plain").module
    for row in rows:
        path = folder / row["name"]
        x = torch.from_numpy(classifier.preprocessing.array(images.read(path)))[None]
        kept = []

        def after(_, __, output, kept=kept):
            output.register_hook(kept.append)

        handle = net.features[0].register_forward_hook(after)
        scores, label = net(x), torch.tensor([["cat", "cup"].index(path.parent.name)])
        value = {
            "predicted": scores.max(),
            "label": scores[0, label[0]],
            "loss": torch.nn.functional.cross_entropy(scores, label),
        }[objective]
        value.backward()
        handle.remove()
        wanted = kept[0].flatten(2).norm(dim=2)[0]
        assert np.allclose(row["values"], wanted.numpy(), rtol=1e-4, atol=1e-8)


def test_a_watched_recording_is_diagnosed(capfd, tmp_path, network, folder):
    run = tmp_path / "run"
    words = ["record", folder / "cat", "--model", f"{network}:plain", "--measure", "zero-fraction", "--diagnose"]
    code, _, err = call(capfd, *words, "--batch-size", 2, "--out", run)
    assert code == 0, err
    assert {row["batch"] for row in ut.Run(run).table("diagnosis").to_pylist()} == {0}
    code, out, _ = call(capfd, "diagnose", run, "--json")
    assert code == 0
    assert json.loads(out)[0]["checked"]["pooling"] == "checked"


def test_interrupted_and_resumed(tmp_path, network, folder):
    run, whole = tmp_path / "run", tmp_path / "whole"
    words = [sys.executable, "-m", "undertow", "record", str(folder), "--model", f"{network}:slow", "--batch-size", "2"]
    process = subprocess.Popen(
        [*words, "--out", str(run)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )
    passes, deadline = Path(network + ".passes"), time.monotonic() + 60
    while (not passes.exists() or passes.stat().st_size < 6) and time.monotonic() < deadline:
        time.sleep(0.02)  # some passes look at the network; the rest record a batch each
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    before = ut.Run(run).table("channel_norm").num_rows
    assert 0 < before < 60
    refused = subprocess.run([*words, "--out", str(run)], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "add --resume" in refused.stderr
    resumed = subprocess.run([*words, "--out", str(run), "--resume"], capture_output=True, text=True)
    assert "batches were there already" in resumed.stdout
    subprocess.run([*words, "--out", str(whole)], capture_output=True)
    order = [(name, "ascending") for name in ("batch", "sample", "site")]
    tables = [ut.Run(folder).table("channel_norm").sort_by(order) for folder in (run, whole)]
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sites", "convv"], "did you mean conv"),
        (["--sites", "conv[9]"], "select nothing"),
        (["--objective", "label"], "no folder named after a class"),
        (["--measure", "norms"], "channel-norm"),
    ],
)
def test_wrong_words(capfd, tmp_path, network, folder, words, message):
    (folder / "other").mkdir()
    (folder / "cat" / "1.png").rename(folder / "other" / "1.png")
    code, _, err = call(capfd, "record", folder, "--model", f"{network}:plain", "--out", tmp_path / "run", *words)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_a_missing_folder_and_one_without_a_readable_photograph(capfd, tmp_path, network):
    words = ("--model", f"{network}:plain", "--out", tmp_path / "run")
    code, _, err = call(capfd, "record", tmp_path / "nope", *words)
    assert code == 2
    assert "nope does not exist" in err
    assert not (tmp_path / "run").exists()
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "a.png").write_bytes(b"no picture")
    code, _, err = call(capfd, "record", tmp_path / "all", *words)
    assert code == 2
    assert "none of 1 photographs could be read; the first:" in err
    assert "a.png" in err


def test_reading_what_is_no_run(capfd, tmp_path):
    code, _, err = call(capfd, "quantiles", tmp_path)
    assert code == 2
    assert str(tmp_path) in err


def test_sites_are_printed_in_order_of_execution(capfd, network):
    code, out, _ = call(capfd, "sites", "--model", f"{network}:plain", "conv[:2], head", "--json")
    assert code == 0
    assert [site["name"] for site in json.loads(out)] == ["features.0", "features.2", "head"]
    code, out, _ = call(capfd, "sites", "--model", f"{network}:plain", "conv[-1]")
    assert "features.4" in out
    assert "1 x 4 x 3 x 3" in out


def test_a_run_renders_without_a_framework(tmp_path, network, folder):
    classifier = models.load(f"{network}:plain")
    record_photographs(classifier, folder, tmp_path / "run", measures=["histogram"])
    spy = (
        "import sys\nsys.modules['torch'] = None\nfrom undertow.cli import main\n"
        f"try:\n    main(['quantiles', {str(tmp_path / 'run')!r}, '--plot', {str(tmp_path / 'a.png')!r}])\n"
        "except SystemExit as left:\n    print('code', left.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", spy], capture_output=True, text=True)
    assert done.stdout.endswith("code 0\n"), done.stderr
    assert (tmp_path / "a.png").exists()
