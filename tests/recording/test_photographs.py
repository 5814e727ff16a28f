"""A folder of photographs: which class each gradient is of, what keeping takes, how fast it goes."""

import numpy as np
import pytest
import torch
from PIL import Image

import undertow as ut
from undertow import images, models
from undertow.cli import main, progress
from undertow.errors import InputError
from undertow.recording.photographs import kept_bytes, record_photographs
from undertow.runs import same_class

NETWORK = """
import torch

def build(seed, names=("cat", "cup", "man")):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, stride=2), torch.nn.ReLU(), torch.nn.Conv2d(4, 5, 3, stride=2),
        torch.nn.Flatten(), torch.nn.Linear(5 * 7 * 7, 3))
    size = {"resize": 40, "crop": 32, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return {"module": net, "preprocessing": size, "classes": list(names)}

def one(): return build(1)
def other(): return build(2, ("man", "cat", "cup"))
"""
LABELS = ("cat", "cup", "man")


@pytest.fixture
def network(tmp_path):
    (tmp_path / "nets.py").write_text(NETWORK)
    return f"{tmp_path}/nets.py"


@pytest.fixture
def folder(tmp_path):
    for i in range(7):
        (tmp_path / "photographs" / LABELS[i % 3]).mkdir(parents=True, exist_ok=True)
        draw = np.random.default_rng(i)
        picture = draw.integers(0, 255, (48, 48, 3)) * draw.random(3)
        Image.fromarray(picture.astype(np.uint8)).save(tmp_path / "photographs" / LABELS[i % 3] / f"{i}.png")
    return tmp_path / "photographs"


def by_hand(classifier, folder):
    """Each photograph's scores."""
    with torch.no_grad():
        return {
            str(path.relative_to(folder)): classifier.module(
                torch.from_numpy(classifier.preprocessing.array(images.read(path)))[None]
            )[0]
            for path in images.find([folder])
        }


@pytest.mark.parametrize("objective", ["predicted", "label", "loss"])
def test_samples_have_the_class_and_its_score(objective, network, folder, tmp_path):
    classifier = models.load(f"{network}:one")
    record_photographs(classifier, folder, tmp_path / "run", objective=objective, batch_size=3)
    rows = ut.Run(tmp_path / "run").table("samples").to_pylist()
    scores = by_hand(classifier, folder)
    assert {row["name"] for row in rows} == set(scores)
    for row in rows:
        of_this = scores[row["name"]]
        label = LABELS.index(row["name"].split("/")[0])
        assert row["class"] == (int(of_this.argmax()) if objective == "predicted" else label)
        assert row["class_name"] == LABELS[row["class"]]
        assert row["score"] == pytest.approx(float(of_this[row["class"]]), rel=1e-5)


def test_compare_says_for_how_many_both_networks_saw_the_same_class(network, folder, tmp_path, capsys):
    seen = {}
    for name in ("one", "other"):
        classifier = models.load(f"{network}:{name}")
        record_photographs(classifier, folder, tmp_path / name, limit=7 if name == "one" else 6)
        seen[name] = {key: classifier.classes[int(s.argmax())] for key, s in by_hand(classifier, folder).items()}
    runs = [ut.Run(tmp_path / name) for name in seen]
    both = {row["name"] for row in runs[1].table("samples").to_pylist()}
    same = sum(seen["one"][name] == seen["other"][name] for name in both)
    agreement = same_class(*runs)
    assert (agreement.same, agreement.photographs) == (same, 6)
    with pytest.raises(SystemExit, match="0"):
        main(["compare", *(str(run.folder) for run in runs)])
    assert f"saw the same class in {same} of 6 photographs" in capsys.readouterr().out
    record_photographs(classifier, folder, tmp_path / "labels", objective="label")
    assert same_class(runs[0], ut.Run(tmp_path / "labels")) is None  # which were asked about, not seen


def test_what_keeping_takes_is_said_beforehand_and_true(network, folder, tmp_path, capsys):
    classifier = models.load(f"{network}:one")
    record_photographs(classifier, folder, tmp_path / "run", sites="conv", measures=("keep",), phase="both")
    arrays = [array for _, array in ut.Run(tmp_path / "run").tensors()]
    assert kept_bytes(classifier, "conv", "both") * 7 == sum(array.nbytes for array in arrays)
    words = ["record", folder, "--model", f"{network}:one", "--sites", "conv[:1]", "--measure", "keep", "--out"]
    with pytest.raises(SystemExit, match="0"):
        main([*map(str, words), str(tmp_path / "other")])
    assert "keep will take 25.2 kB: 3.6 kB for each photograph, 7 of them" in capsys.readouterr().err


def test_speed_and_time_left_are_said(network, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    words = ["record", folder, "--model", f"{network}:one", "--batch-size", "3", "--out", tmp_path / "run"]
    with pytest.raises(SystemExit, match="0"):
        main([*map(str, words)])
    said = capsys.readouterr()
    first, *_ = [line for line in said.err.splitlines() if "images/s" in line]
    assert first.startswith("3 of 7 photographs, ")
    assert first.endswith(" left")
    assert "7 photographs recorded in 0:0" in said.out


def test_parameters_are_frozen_here(network, folder, tmp_path):
    with pytest.raises(InputError, match="weights are frozen"):
        record_photographs(models.load(f"{network}:one"), folder, tmp_path / "run", sites="params")
    assert not (tmp_path / "run").exists()


def test_only_columns_that_were_announced_and_fit_are_taken(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    recording = ut.record(tmp_path, model, sites="linear", measures="norm")
    recording.sample_columns = {"loss": "float64"}

    def described(columns):
        with recording.batch():
            model(torch.ones(2, 3)).sum().backward()
            recording.describe(columns)

    with recording:
        with pytest.raises(InputError, match="inside"):
            recording.describe({"loss": [1.0]})
        for columns, said in (({"lost": [1.0, 2.0]}, "not announced"), ({"loss": [1.0]}, "loss has 1 values")):
            with pytest.raises(InputError, match=said):
                described(columns)
        described({"loss": [1.0, 2.0]})
        described({})
    assert ut.Run(tmp_path).table("samples")["loss"].to_pylist() == [1.0, 2.0, None, None]
