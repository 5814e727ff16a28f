"""Blocks of a Keras network on TensorFlow: what each edge carries, against tapes and against torch."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from keras import layers
from torch import nn

import undertow as ut


@pytest.fixture
def x():
    return np.random.default_rng(5).normal(size=(2, 8, 8, 3)).astype("float32")


def residual():
    """A functional network with a nested model, a sum and a layer that runs twice."""
    keras.utils.set_random_seed(3)
    inner = keras.Sequential(
        [layers.Conv2D(3, 3, padding="same", activation="relu", name="c"), layers.BatchNormalization(name="n")],
        name="inner",
    )
    shared = layers.Conv2D(3, 3, padding="same", activation="swish", name="shared")
    given = keras.Input((8, 8, 3))
    h = shared(shared(given))
    h = layers.Dropout(0.5, name="drop")(layers.Add(name="sum")([inner(h), h]))
    h = layers.GlobalAveragePooling2D(name="pool")(h)
    return keras.Model(given, layers.Dense(5, activation="softmax", name="head")(h))


def test_norms_and_edges_equal_a_tapes(x):
    net = residual()
    blocks = ut.derive.from_model(net, x, target=[1, 3])
    assert blocks.order == ["x", "shared#0", "shared#1", "inner", "sum", "pool", "head"]
    assert list(blocks.passed_on) == ["drop"]
    assert blocks.readers["shared#1"] == ["inner", "sum"]
    assert blocks.check(blocks.derivative("x"), 0) < 1e-5
    layer = net.get_layer
    with tf.GradientTape(persistent=True) as tape:
        given = tf.constant(x)
        tape.watch(given)
        h = layer("shared")(layer("shared")(given))
        for_inner, for_sum = tf.identity(h), tf.identity(h)
        scores = layer("head")(layer("pool")(layer("inner")(for_inner) + for_sum))
        error = tf.reduce_sum(tf.gather(scores, [1, 3], axis=1, batch_dims=1))
    carried = blocks.carried
    for name, tensor in (("inner", for_inner), ("sum", for_sum)):
        assert carried["shared#1", name] == pytest.approx(float(tf.norm(tape.gradient(error, tensor))), rel=1e-4)
    norms = {block.name: block.gradient for block in blocks.blocks}
    assert norms["shared#1"] == pytest.approx(float(tf.norm(tape.gradient(error, h))), rel=1e-4)
    assert norms["x"] == pytest.approx(float(tf.norm(tape.gradient(error, given))), rel=1e-4)


def test_deeper_blocks_are_those_within_nested_models(x):
    blocks = ut.derive.from_model(residual(), x, depth=2)
    assert [name for name in blocks.order if "inner" in name] == ["inner.c", "inner.n"]
    assert blocks.check(blocks.derivative("inner.c"), 0) < 1e-5


class Block(keras.Model):
    """A sum of its own, and functions in the place of layers."""

    def __init__(self):
        super().__init__()
        self.enter, self.bend, self.head = (layers.Dense(4, name=name) for name in ("enter", "bend", "head"))

    def call(self, v):
        h = self.enter(v)
        return self.head(h + keras.ops.relu(self.bend(h)))


class TorchBlock(nn.Module):
    """The same in torch."""

    def __init__(self):
        super().__init__()
        self.enter, self.bend, self.head = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, v):
        h = self.enter(v)
        return self.head(h + self.bend(h).relu())


def test_blocks_are_those_of_torch():
    net, twin, numbers = Block(), TorchBlock(), np.random.default_rng(2)
    v = numbers.normal(size=(3, 4)).astype("float32")
    net(v)
    for name in ("enter", "bend", "head"):
        kernel, bias = numbers.normal(size=(4, 4)), numbers.normal(size=4)
        getattr(net, name).set_weights([kernel, bias])
        getattr(twin, name).weight.data = torch.tensor(kernel.T, dtype=torch.float32)
        getattr(twin, name).bias.data = torch.tensor(bias, dtype=torch.float32)
    ours, theirs = ut.derive.from_model(net, v), ut.derive.from_model(twin, torch.tensor(v))
    assert ours.order == theirs.order == ["x", "enter", "bend", "add", "head"]
    assert ours.readers == theirs.readers
    assert ours.derivative("enter").text == theirs.derivative("enter").text
    for edge, norm in theirs.carried.items():
        assert ours.carried[edge] == pytest.approx(norm, rel=1e-4)


def test_a_wrong_gradient_of_an_operation_would_be_seen(x, monkeypatch):
    from undertow.frameworks.keras.inspect import blocks as module

    true = module.gradients_of_operation

    def flipped(kind, *args):
        found = true(kind, *args)
        return [-g if kind == "Relu" else g for g in found]

    monkeypatch.setattr(module, "gradients_of_operation", flipped)
    blocks = ut.derive.from_model(residual(), x)
    assert blocks.check(blocks.derivative("x"), 0) > 1e-2


def test_several_inputs_embeddings_and_loops():
    words, given = keras.Input((6,), dtype="int32"), keras.Input((6, 3))
    h = layers.Concatenate(name="both")([layers.Embedding(9, 3, name="embed")(words), given])
    net = keras.Model([words, given], layers.Dense(2, name="head")(layers.LSTM(4, name="lstm")(h)))
    ids = np.random.default_rng(0).integers(0, 9, (2, 6)).astype("int32")
    blocks = ut.derive.from_model(net, (ids, np.ones((2, 6, 3), "float32")))
    assert blocks.order == ["x[1]", "embed", "both", "lstm", "head"]
    assert blocks.check(blocks.derivative("x[1]"), 0) < 1e-5
    deeper = ut.derive.from_model(net, (ids, np.ones((2, 6, 3), "float32")), depth=2)
    assert {f"lstm.lstm_cell#{t}" for t in range(1, 7)} < set(deeper.order)  # Keras calls it once more, before the loop
    assert deeper.check(deeper.derivative("lstm.lstm_cell#1"), 0) < 1e-5


def test_what_cannot_be_told_apart_is_refused(x):
    @tf.custom_gradient
    def mine(v):
        return tf.nn.relu(v), lambda g: g

    def around(function):
        given = keras.Input((8, 8, 3))
        h = layers.Lambda(function, name="mine")(layers.Conv2D(2, 3, name="c")(given))
        return keras.Model(given, layers.Dense(3)(layers.Flatten()(h)))

    with pytest.raises(ut.ModelError, match=r"mine runs tf\.custom_gradient 'mine'"):
        ut.derive.from_model(around(mine), x)
    two = tf.function(lambda v, w: v * w)
    with pytest.raises(ut.ModelError, match=r"mine runs a tf\.function"):
        ut.derive.from_model(around(lambda v: two(v, tf.nn.relu(v))), x)
    with pytest.raises(ut.InputError, match="depend on nothing by any gradient"):
        ut.derive.from_model(around(tf.stop_gradient), x, target=lambda y: tf.stop_gradient(y)[:, 0])
    with pytest.raises(ut.InputError, match=r"its blocks are the calls of a keras\.Model's layers"):
        ut.derive.from_model(lambda v: v, tf.constant(x))


def test_a_grouped_convolution_which_keras_compiles_is_a_block(x):
    """TensorFlow has its gradient on no CPU, so Keras runs it in a function of XLA's."""
    given = keras.Input((8, 8, 3))
    h = layers.Conv2D(6, 3, groups=3, activation="relu", name="grouped")(given)
    net = keras.Model(given, layers.Dense(3)(layers.GlobalAveragePooling2D()(layers.ReLU(name="gate")(h))))
    blocks = ut.derive.from_model(net, x, target=1)
    assert blocks.order[:3] == ["x", "grouped", "gate"]
    assert blocks.check(blocks.derivative("x"), 0) < 1e-5
    with tf.GradientTape() as tape:
        source = tf.constant(x)
        tape.watch(source)
        score = tf.reduce_sum(net(source)[:, 1])
    expected = tape.gradient(score, source)
    assert blocks.carried["x", "grouped"] == pytest.approx(float(tf.norm(expected)), rel=1e-4)
    a = ut.explain(net, x, rule=lambda g, local: local(g), target=1)  # the rule that is the plain gradient
    assert (a.rewired, np.abs(a.values - expected).max() <= 1e-5 * np.abs(expected).max()) == (2, True)
