"""Kinds of input, of layers and of output of Keras models: maps in the structure of `x`, equal to the twin's."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import undertow as ut
from frameworks.keras.references import ruled

DRAW = np.random.default_rng(0)
IMAGE, COLUMN = (DRAW.normal(size=shape).astype("float32") for shape in ((2, 6, 5, 3), (2, 3)))
IDS = np.array([[0, 2], [1, 1]])
CLASS = 2


def joined(image, column, ids=None):
    """An image of several inputs."""
    h = layers.Add()([image, layers.Reshape((1, 1, 3))(column)])
    return h if ids is None else layers.Add()([h, layers.Reshape((1, 1, 6))(layers.Embedding(3, 3)(ids))[..., :3]])


def given(name, shape, dtype="float32"):
    return keras.Input(shape, name=name, dtype=dtype)


def inputs():
    """The inputs that models are made of, fresh for each."""
    return given("image", (6, 5, 3)), given("column", (3,)), given("ids", (2,), "int32")


# name: (from the three inputs to those of the model and the image that it reads, x)
INPUTS = {
    "array": (lambda image, *_: (image, image), IMAGE),
    "tensor": (lambda image, *_: (image, image), tf.constant(IMAGE)),
    "list": (lambda image, column, _: ([image, column], joined(image, column)), [IMAGE, COLUMN]),
    "dict": (
        lambda image, column, _: ({"image": image, "column": column}, joined(image, column)),
        {"column": COLUMN, "image": IMAGE},
    ),
    "dict with whole numbers": (
        lambda image, column, ids: ({"ids": ids, "image": image, "column": column}, joined(image, column, ids)),
        {"ids": IDS, "column": COLUMN, "image": IMAGE},
    ),
    "list with whole numbers": (
        lambda image, column, ids: ([image, column, ids], joined(image, column, ids)),
        [IMAGE, COLUMN, IDS],
    ),
    "nested": (
        lambda image, column, ids: ({"pair": [image, column], "ids": ids}, joined(image, column, ids)),
        {"pair": [IMAGE, COLUMN], "ids": IDS},
    ),
}


def attention(image):
    tokens = layers.Reshape((30, 3))(image)
    return layers.Dense(4, activation="relu")(layers.MultiHeadAttention(1, 3)(tokens, tokens))


LAYERS = {
    "convolution": lambda image: layers.Conv2D(4, 2, activation="relu")(image),
    "dense, channels last": lambda image: layers.ReLU()(layers.Dense(4)(image)),
    "layer norm, channels last": lambda image: layers.Activation("relu")(layers.LayerNormalization()(image)),
    "attention over tokens": attention,
}


class TwoHeads(keras.Model):
    """A subclassed model that returns what it likes."""

    def __init__(self, give):
        super().__init__()
        self.body, self.head, self.other = layers.Dense(8, activation="relu"), layers.Dense(5), layers.Dense(3)
        self.flatten, self.give = layers.Flatten(), give

    def call(self, image):
        h = self.body(self.flatten(image))
        return self.give(self.head(h), self.other(h))


# name: (from the scores and a second head to what is returned, output=, the scores in it)
OUTPUTS = {
    "tensor": (lambda scores, _: scores, None, lambda out: out),
    "first of a list": (lambda scores, other: [scores, other], None, lambda out: out[0]),
    "second of a tuple": (lambda scores, other: (other, scores), 1, lambda out: out[1]),
    "logits of a dict": (lambda scores, other: {"other": other, "logits": scores}, None, lambda out: out["logits"]),
    "a name in a dict": (lambda scores, other: {"other": other, "out": scores}, "out", lambda out: out["out"]),
    "a path": (
        lambda scores, other: {"heads": [other, {"b": scores}]},
        "heads.1.b",
        lambda out: out["heads"][1]["b"],
    ),
}


def leaves(values):
    if isinstance(values, dict | list | tuple):
        return [leaf for item in (values.values() if isinstance(values, dict) else values) for leaf in leaves(item)]
    return [values]


def assert_same(values, wanted):
    found = leaves(values)
    assert [v is None for v in found] == [w is None for w in wanted]
    for v, w in zip(found, wanted, strict=True):
        if w is not None:
            scale = np.abs(w).max()
            assert scale > 0
            np.testing.assert_allclose(np.asarray(v) / scale, w / scale, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", INPUTS)
def test_every_input_with_every_layer(name, kind):
    keras.utils.set_random_seed(4)
    make, x = INPUTS[name]
    model_inputs, image = make(*inputs())
    model = keras.Model(model_inputs, layers.Dense(5)(layers.Flatten()(LAYERS[kind](image))))
    for rule in ("gradient", "guided"):
        a = ut.explain(model, x, rule=rule, target=CLASS)
        wanted, calls = ruled(model, x, lambda out: out[:, CLASS], rule)
        assert_same(a.values, wanted)
        assert a.rewired == (calls if rule == "guided" else 0)
        assert isinstance(a.values, type(x))


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_output(name):
    keras.utils.set_random_seed(4)
    give, path, scores = OUTPUTS[name]
    model = TwoHeads(give)
    model(IMAGE)
    a = ut.explain(model, IMAGE, rule="guided", target=CLASS, output=path)
    assert_same(a.values, ruled(model, IMAGE, lambda out: scores(out)[:, CLASS], "guided")[0])
    of_all = ut.explain(model, IMAGE, rule="guided", target=lambda out: scores(out)[:, 1] - scores(out)[:, 3])
    assert_same(of_all.values, ruled(model, IMAGE, lambda out: scores(out)[:, 1] - scores(out)[:, 3], "guided")[0])
