"""Keras networks by reference and from the command line: real networks and files, and every way that fails."""

import json
import os
import subprocess
import sys
import urllib.error
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from PIL import Image

import undertow as ut
from undertow import models
from undertow.cli import main
from undertow.frameworks import downloading
from undertow.images import Preprocessing, demo_photographs, read

RANDOM = "keras:MobileNetV2@none"

# Keras's own saving and loading, with NumPy 2
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
    pytest.mark.filterwarnings("ignore:nothing in .* says how pixels are scaled"),  # see test_pixels.py
]


@pytest.fixture(scope="module")
def named() -> models.Classifier:
    return models.load(RANDOM)


def saved(folder: Path, *stack: layers.Layer) -> Path:
    path = folder / "net.keras"
    keras.Sequential([keras.Input((16, 16, 3)), *stack]).save(path)
    return path


def small(folder: Path) -> Path:
    head = [layers.Flatten(), layers.Dense(4, activation="softmax", name="top")]
    return saved(folder, layers.Conv2D(5, 3, activation="relu", name="first"), layers.MaxPooling2D(), *head)


def run(capsys, *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    out = capsys.readouterr()
    return int(ended.value.code or 0), out.out, out.err


def test_applications_are_whole_and_the_same_every_time(named):
    again = models.load(RANDOM)
    assert named.weights_sha256 == again.weights_sha256
    assert (named.weights, len(named.classes), named.classes[282]) == ("random (seed 0)", 1000, "tiger cat")
    assert named.module.layers[-1].activation is keras.activations.linear
    assert named.preprocessing.crop == 224


@pytest.mark.parametrize("name", ["VGG16", "MobileNetV2", "DenseNet121", "EfficientNetB0"])  # one of each convention
def test_preprocessing_is_the_networks_own(name):
    from undertow.frameworks.keras.zoo import own_preprocessing

    class Shaped:
        input_shape = (None, 224, 224, 3)

    build = getattr(keras.applications, name)
    ours = own_preprocessing(build, Shaped)
    photograph = read(demo_photographs()["chelsea"])
    pixels = ours.view(photograph)
    theirs = sys.modules[build.__module__].preprocess_input(pixels.astype(np.float32)[None])[0]
    assert np.allclose(ours.array(photograph).transpose(1, 2, 0), theirs, atol=2e-5 * np.abs(theirs).max())
    assert Preprocessing(**ours.to_dict()) == ours


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("keras:ResNet5", "keras has no classifier 'ResNet5'; did you mean ResNet50"),
        ("keras:qqq", "`undertow models keras:` lists them"),
        ("keras:VGG16@V9", "has no weights 'V9'; it has imagenet and none"),
        ("nowhere.keras", "no model nowhere.keras: there is no such file"),
    ],
)
def test_unknown_models_are_refused(reference, message):
    with pytest.raises(ut.ModelError, match=message):
        models.load(reference)


def test_weights_that_cannot_be_downloaded_are_refused(monkeypatch, tmp_path):
    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(downloading.urllib.request, "urlopen", refuse)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    with pytest.raises(ut.ModelError, match=r"could not download the weights of keras:VGG16 .*keras:VGG16@none"):
        models.load("keras:VGG16")


def test_weights_from_a_file(named, tmp_path):
    path = tmp_path / "mine.weights.h5"
    named.module.save_weights(path)
    loaded = models.load("keras:MobileNetV2", path)
    assert (loaded.weights, loaded.weights_sha256) == ("mine.weights.h5", named.weights_sha256)
    keras.Sequential([keras.Input((4,)), layers.Dense(2)]).save_weights(path)
    with pytest.raises(ut.ModelError, match=r"mine.weights.h5 does not fit keras:MobileNetV2"):
        models.load("keras:MobileNetV2", path)
    with pytest.raises(ut.ModelError, match="there is no such file"):
        models.load("keras:MobileNetV2", tmp_path / "none.weights.h5")


def test_a_saved_model_stays_as_it_is(tmp_path):
    path = small(tmp_path)
    before = keras.saving.load_model(path)
    classifier = models.load(str(path))
    assert classifier.classes == ("class 0", "class 1", "class 2", "class 3")
    assert classifier.preprocessing == Preprocessing(16, 16, (0.0,) * 3, (1.0,) * 3)
    x = np.random.default_rng(0).random((2, 16, 16, 3)).astype(np.float32)
    assert np.array_equal(classifier.module(x).numpy(), before(x).numpy())
    assert ut.explain(classifier, x).head == "before softmax"


def test_saved_code_is_never_run(tmp_path):
    path = saved(tmp_path, layers.Lambda(lambda v: v * 2), layers.Flatten(), layers.Dense(2))
    with pytest.raises(ut.ModelError, match="holds a lambda, which is code and is never run"):
        models.load(str(path))
    path.write_bytes(b"no archive")
    with pytest.raises(ut.ModelError, match=r"no readable .keras file, which is a zip archive"):
        models.load(str(path))


def packed(path, **arrays):
    """Write weights that take little and unpack to much."""
    with h5py.File(path, "w") as file:
        for name, shape in arrays.items():
            file.create_dataset(name, shape, "float32", compression="gzip", fillvalue=0)
    return path


def test_archives_that_unpack_to_gigabytes_are_refused_by_what_they_declare(tmp_path):
    whole = small(tmp_path)
    for name, size in (("assets/zeros", 400 << 20), ("model.weights.h5", 0)):
        bomb = tmp_path / "bomb.keras"
        with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as other:
            for member in archive.namelist():
                if member != name:
                    other.writestr(member, archive.read(member))
            if size:
                with other.open(name, "w", force_zip64=True) as file:
                    for _ in range(size >> 20):
                        file.write(bytes(1 << 20))
            else:
                other.write(packed(tmp_path / "w.h5", a=(1 << 30,)), name)
        assert bomb.stat().st_size < 1 << 20
        with pytest.raises(ut.ModelError, match=r"bomb.keras would unpack to [0-9,]{11,} bytes"):
            models.load(str(bomb))
    with pytest.raises(ut.ModelError, match=r"mine.weights.h5 would unpack to 4,294,967,296 bytes"):
        models.load(str(whole), packed(tmp_path / "mine.weights.h5", a=(1 << 30,)))


def test_weights_that_read_other_files_are_refused(named, tmp_path):
    path = tmp_path / "mine.weights.h5"
    with h5py.File(path, "w") as file:
        file["layers"] = h5py.ExternalLink("other.h5", "/")
    with pytest.raises(ut.ModelError, match="it reads other files"):
        models.load("keras:MobileNetV2", path)
    path.write_bytes(b"no weights")
    with pytest.raises(ut.ModelError, match="save it again"):
        models.load("keras:MobileNetV2", path)


def test_custom_layers_need_their_code(tmp_path):
    with zipfile.ZipFile(small(tmp_path)) as whole, zipfile.ZipFile(tmp_path / "own.keras", "w") as other:
        for name in whole.namelist():
            other.writestr(name, whole.read(name).replace(b'"class_name": "Flatten"', b'"class_name": "TheirOwn"'))
    with pytest.raises(ut.ModelError, match=r"custom layers; load it in FILE.py:FUNCTION"):
        models.load(str(tmp_path / "own.keras"))


def test_networks_that_a_function_makes(tmp_path):
    file = tmp_path / "nets.py"
    head = "import keras\nL = keras.layers\n"
    head += "def net(*end):\n    return keras.Sequential([keras.Input((16, 16, 3)), *end])\n"
    file.write_text(
        head + "def good():\n    return {'module': net(L.Conv2D(3, 3, activation='relu'), L.Flatten(), L.Dense(2)), "
        "'classes': ['cat', 'dog']}\n"
        "def features():\n    return net(L.Conv2D(3, 3))\n"
        "def wrong():\n    return {'module': net(L.Flatten(), L.Dense(2)), 'classes': ['cat']}\n"
    )
    classifier = models.load(f"{file}:good")
    assert classifier.classes == ("cat", "dog")
    assert models.load(f"{file}:good").weights_sha256 == classifier.weights_sha256
    with pytest.raises(ut.ModelError, match=r"must give scores of shape \(B, classes\)"):
        models.load(f"{file}:features")
    with pytest.raises(ut.ModelError, match="names 1 classes but scores 2"):
        models.load(f"{file}:wrong")


def test_listing():
    rows = {row.reference: row for row in models.listing("keras:densenet")}
    assert set(rows) == {f"keras:DenseNet{n}{end}" for n in (121, 169, 201) for end in ("", "@none")}
    assert rows["keras:DenseNet201@none"].offline


def test_explaining_a_photograph(capsys, tmp_path):
    photograph = demo_photographs()["chelsea"]
    model = small(tmp_path)
    code, out, err = run(capsys, "explain", photograph, "--model", model, "--out", tmp_path / "out", "--json")
    assert (code, len(err.replace("\r", "").strip().splitlines())) == (0, 1)  # the note on a guess
    (result,) = json.loads(out)["results"]
    assert result["rules"]["guided"]["rewired"] == 1
    assert result["versions"]["keras"] == keras.__version__
    assert sum(row["probability"] for row in result["predictions"]) == pytest.approx(1, abs=1e-4)
    folder = tmp_path / "out" / "chelsea"
    with Image.open(folder / "guided-magnitude.png") as picture:
        assert picture.size == (16, 16)


def test_a_map_of_a_network_that_reads_bgr_is_drawn_in_rgb(tmp_path):
    from undertow.attribution.photograph import explain_photograph, write

    red_only = keras.Sequential([keras.Input((8, 8, 3)), layers.ReLU(), layers.Flatten(), layers.Dense(2)])
    kernel = np.zeros((8, 8, 3, 2), np.float32)
    kernel[..., 2, :] = 1  # B, G, R: the third is red
    red_only.set_weights([kernel.reshape(-1, 2), np.zeros(2)])
    preprocessing = Preprocessing(8, 8, (0.0,) * 3, (1.0,) * 3, order="BGR")
    classifier = models.Classifier("made", red_only, preprocessing, ("a", "b"), "made", "")
    explained = explain_photograph(classifier, demo_photographs()["chelsea"], rules=["gradient"])
    values = explained.maps["gradient"].values.numpy()[0, 0]
    assert [bool(values[..., channel].any()) for channel in range(3)] == [False, False, True]
    write(explained, classifier, tmp_path / "out")
    with Image.open(tmp_path / "out" / "gradient-colour.png") as opened:
        picture = np.asarray(opened).astype(int)
    assert (picture[..., 0] > picture[..., 2]).all()


def test_photographs_are_prepared_with_their_channels_last(tmp_path):
    photographs = [demo_photographs()[name] for name in ("chelsea", "coffee")]
    preprocessing = Preprocessing(8, 8)
    model = keras.Sequential([keras.Input((8, 8, 3)), layers.Flatten(), layers.Dense(2)])
    classifier = models.Classifier("made", model, preprocessing, ("a", "b"), "made", "")
    expected = np.stack([preprocessing.array(read(path)).transpose(1, 2, 0) for path in photographs])
    assert np.array_equal(classifier.prepare(photographs).numpy(), expected)
    read(photographs[0]).save(tmp_path / "chelsea.png")
    assert np.array_equal(ut.images.Folder(tmp_path, classifier)[0][0], expected[0])
    assert np.array_equal(ut.images.Folder(tmp_path, preprocessing)[0][0], expected[0].transpose(2, 0, 1))


def test_a_map_of_keras_is_drawn():
    values = np.random.default_rng(0).normal(size=(1, 6, 5, 3))
    drawn = ut.show.draw(tf.constant(values), channels_last=True)
    assert np.array_equal(drawn, ut.show.draw(values[0].transpose(2, 0, 1)))


def test_recording_photographs(capsys, tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for name in ("chelsea", "coffee"):
        read(demo_photographs()[name]).resize((40, 30)).save(folder / f"{name}.png")
    model, out = small(tmp_path), tmp_path / "run"
    words = ["record", folder, "--model", model, "--sites", "conv, linear", "--out", out, "--measure", "channel-norm"]
    assert run(capsys, *words)[0] == 0
    recorded = ut.Run(out)
    rows = recorded.table("channel_norm").to_pylist()
    assert {(row["name"], row["site"]) for row in rows} == {
        (f"{name}.png", site) for name in ("chelsea", "coffee") for site in ("first", "top")
    }
    top = [row["values"] for row in rows if row["site"] == "top"]
    assert all(sorted(values) == [0, 0, 0, 1] for values in top)  # of the highest score, summed over the batch
    assert recorded.manifest["model"]["mode"] == "evaluation"
    code, out_text, _ = run(capsys, "sites", "--model", model, "conv")
    assert code == 0
    assert "first" in out_text


def test_a_trace_from_the_command(capsys, tmp_path):
    code, out, _ = run(capsys, "trace", "--model", small(tmp_path))
    assert code == 0
    assert "Conv2D" in out
    assert "differs" not in out


def test_tensorflow_is_loaded_only_when_needed():
    code = "import sys, undertow, undertow.models, undertow.cli; assert not {'keras', 'tensorflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_command_writes_no_line_of_tensorflows(tmp_path):
    words = [sys.executable, "-m", "undertow", "sites", "--model", small(tmp_path), "conv"]
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    assert subprocess.run(words, capture_output=True, text=True, check=True, env=environment).stderr == ""
