"""Which scale of pixels a saved Keras model is given: read off it, said, or a guess that is told."""

import json

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from PIL import Image

import undertow as ut
from undertow.cli import main
from undertow.frameworks.keras.pixels import GUESS, pixel_scale
from undertow.frameworks.keras.zoo import own_preprocessing
from undertow.images import Preprocessing, demo_photographs
from undertow.scales import SCALES, describe

OWN = "it scales them before its first weights"
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


def stack(*first, size=16):
    return keras.Sequential(
        [keras.Input((size, size, 3)), *first, layers.Conv2D(4, 3), layers.Flatten(), layers.Dense(4)]
    )


def functional(prepare, size=16):
    image = keras.Input((size, size, 3))
    return keras.Model(image, layers.Dense(4)(layers.Flatten()(layers.Conv2D(4, 3)(prepare(image)))))


def nested(first, *before):
    return keras.Sequential([keras.Input((16, 16, 3)), *before, stack(*first)])


ROWS = {
    "rescaling to 0..1": (lambda: stack(layers.Rescaling(1 / 255)), "0..255", OWN),
    "rescaling to -1..1": (lambda: stack(layers.Rescaling(1 / 127.5, offset=-1)), "0..255", OWN),
    "rescaling of 0..1": (lambda: stack(layers.Rescaling(2.0, offset=-1)), "0..1", OWN),
    "behind padding and augmentation": (
        lambda: stack(
            layers.RandomFlip(), layers.RandomRotation(0.1), layers.ZeroPadding2D(), layers.Rescaling(1 / 255)
        ),
        "0..255",
        OWN,
    ),
    "normalization": (
        lambda: stack(layers.Normalization(mean=[123.0, 117.0, 104.0], variance=[3364.0] * 3)),
        "0..255",
        OWN,
    ),
    "arithmetic": (lambda: functional(lambda x: x / 127.5 - 1), "0..255", OWN),
    "mean alone": (lambda: functional(lambda x: x - np.array([123.7, 116.8, 103.9], np.float32)), "0..255", OWN),
    "mean alone, in a nested model": (
        lambda: keras.Sequential([keras.Input((16, 16, 3)), functional(lambda x: x - np.float32(120))]),
        "0..255",
        OWN,
    ),
    "of a nested model": (lambda: nested([layers.Rescaling(1 / 255)]), "0..255", OWN),
    "before a nested model": (lambda: nested([], layers.Rescaling(1 / 255)), "0..255", OWN),
    "in two steps": (lambda: nested([layers.Rescaling(2.0, offset=-1)], layers.Rescaling(1 / 255)), "0..255", OWN),
    "a factor behind weights": (lambda: stack(layers.Conv2D(3, 3), layers.Rescaling(0.01)), "0..1", GUESS),
    "nothing": (lambda: stack(), "0..1", GUESS),
    "a name alone": (lambda: stack(layers.Conv2D(3, 3, name="block1_conv1")), "0..1", GUESS),
}


@pytest.mark.parametrize("row", ROWS)
def test_a_models_own_layers_tell(row, tmp_path):
    make, scale, told_by = ROWS[row]
    model = make()
    assert pixel_scale(model) == (scale, told_by)
    model.save(tmp_path / "net.keras")
    assert pixel_scale(keras.saving.load_model(tmp_path / "net.keras")) == (scale, told_by)


FAMILIES = {
    "VGG16": "VGG",
    "VGG19": "VGG",
    "ResNet50": "ResNet",
    "ResNet50V2": "ResNetV2",
    "DenseNet121": "DenseNet",
    "MobileNet": "MobileNet",
    "MobileNetV2": "MobileNetV2",
    "Xception": "Xception",
    "InceptionV3": "InceptionV3",
    "NASNetMobile": "NASNet",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_networks_of_keras_applications_are_recognised_whole_and_within(name):
    build = getattr(keras.applications, name)
    base = build(weights=None, include_top=False, input_shape=(96, 96, 3))
    own = own_preprocessing(build, base)
    told_by = f"its layers are those of {FAMILIES[name]} of keras.applications"
    within = keras.Sequential([keras.Input((96, 96, 3)), base, layers.GlobalAveragePooling2D(), layers.Dense(4)])
    continued = keras.Model(base.input, layers.Dense(4)(layers.GlobalAveragePooling2D()(base.output)))
    for model in (base, within, continued):
        scale, by = pixel_scale(model)
        assert by == told_by
        assert SCALES[scale]["order"] == own.order
        for field in ("mean", "std"):
            assert np.allclose(SCALES[scale][field], getattr(own, field), atol=1e-4)


@pytest.mark.parametrize("name", ["EfficientNetB0", "MobileNetV3Small", "EfficientNetV2B0", "ConvNeXtTiny"])
def test_those_that_scale_by_themselves_take_bytes(name):
    model = getattr(keras.applications, name)(weights=None, input_shape=(64, 64, 3), classes=4)
    assert pixel_scale(model) == ("0..255", OWN)


def test_preprocessing_within_the_model_goes_before_the_networks_own():
    image = keras.Input((64, 64, 3))
    base = keras.applications.ResNet50(weights=None, include_top=False, input_shape=(64, 64, 3))
    prepared = keras.applications.resnet.preprocess_input(image)
    model = keras.Model(image, layers.Dense(4)(layers.GlobalAveragePooling2D()(base(prepared))))
    assert pixel_scale(model) == ("0..255", OWN)


@pytest.fixture
def plain(tmp_path):
    path = tmp_path / "net.keras"
    stack().save(path)
    return path


def run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    out = capsys.readouterr()
    return int(ended.value.code or 0), out.out, out.err


def test_a_guess_is_told_and_what_is_said_counts(plain, tmp_path, capsys):
    with pytest.warns(
        UserWarning, match=r"nothing in .*net\.keras says how pixels are scaled: they go from 0 to 1; say"
    ):
        guessed = ut.load(plain)
    assert (guessed.guessed, guessed.preprocessing_from) == (True, GUESS)
    said = ut.load(plain, preprocess="caffe")
    assert (said.guessed, said.preprocessing_from, describe(said.preprocessing)) == (
        False,
        "--preprocess caffe",
        "16 x 16 caffe",
    )
    photograph = demo_photographs()["chelsea"]
    words = ["explain", photograph, "--model", plain, "--rule", "gradient", "--out", tmp_path / "out"]
    code, out, err = run(capsys, *words)
    assert code == 0
    assert err.startswith("note: nothing in ")
    assert f"input: 16 x 16 0..1 ({GUESS})" in out
    code, out, err = run(capsys, *words, "--preprocess", "caffe")
    assert (code, err) == (0, "")
    assert "input: 16 x 16 caffe (--preprocess caffe)" in out
    result = json.loads((tmp_path / "out" / "chelsea" / "result.json").read_text())
    assert describe(Preprocessing(**result["preprocessing"])) == "16 x 16 caffe"
    assert result["versions"]["tensorflow"] == tf.__version__


def test_sizes_and_sites_need_no_scale(plain, capsys):
    assert run(capsys, "sites", "--model", plain, "conv")[2] == ""


def test_h5_files_are_read(tmp_path):
    model = stack(layers.Rescaling(1 / 255))
    model.save(tmp_path / "net.h5")
    loaded = ut.load(tmp_path / "net.h5")
    x = np.random.default_rng(0).random((2, 16, 16, 3)).astype(np.float32)
    assert np.allclose(loaded.module(x), model(x), atol=1e-6)
    assert loaded.preprocessing.array(Image.new("RGB", (16, 16), "white")).max() == pytest.approx(255)


def test_what_is_no_whole_model_is_said(tmp_path):
    stack().save_weights(tmp_path / "net.weights.h5")
    with pytest.raises(ut.ModelError, match=r"net\.weights\.h5 holds weights alone; pass them as --weights"):
        ut.load(tmp_path / "net.weights.h5")
    (tmp_path / "broken.h5").write_bytes(b"nothing")
    with pytest.raises(ut.ModelError, match=r"broken\.h5 is no readable HDF5 file"):
        ut.load(tmp_path / "broken.h5")
    with pytest.raises(ut.ModelError, match=r"no model .*none\.h5: there is no such file"):
        ut.load(tmp_path / "none.h5")


def test_code_in_an_h5_file_is_never_run(tmp_path):
    with h5py.File(tmp_path / "net.h5", "w") as file:
        layer = {"class_name": "Lambda", "config": {"function": ["code", None, None]}}
        file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": {"layers": [layer]}})
    with pytest.raises(ut.ModelError, match=r"net\.h5 holds a lambda, which is code and is never run"):
        ut.load(tmp_path / "net.h5")


def test_a_saved_model_is_told_how(tmp_path):
    stack().export(tmp_path / "saved", verbose=False)
    with pytest.raises(
        ut.ModelError, match=r"is a SavedModel, .*model\.save\('FILE\.keras'\), or in Python, with"
    ) as told:
        ut.load(tmp_path / "saved")
    assert str(told.value).isprintable()
    x = tf.constant(np.random.default_rng(0).random((1, 16, 16, 3)), tf.float32)
    saved = tf.saved_model.load(str(tmp_path / "saved"))
    a = ut.explain(saved.serve, x, rule="gradient")  # as the message says
    assert a.values.shape == x.shape
