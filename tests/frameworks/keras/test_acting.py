"""Dropout, noise and batch statistics that act within a Keras model: refused or listed, never silent."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import undertow as ut

X = np.random.default_rng(0).normal(size=(3, 6, 6, 4)).astype(np.float32)
NORM, NORMAL, UNIFORM = "batch norm in training", "StatelessRandomNormalV2", "StatelessRandomUniformV2"


class Within(keras.Model):
    """Calls a layer in training, or not, whatever it is called with itself."""

    def __init__(self, layer, always=True):
        super().__init__()
        self.layer, self.always, self.first, self.last = layer, always, layers.ReLU(), layers.Dense(3)

    def call(self, x, training=None):
        h = self.layer(self.first(x), training=self.always)
        return self.last(keras.ops.reshape(h, (h.shape[0], -1)))


def function_of(layer):
    def call(x):
        return tf.reduce_mean(layer(tf.nn.relu(x), training=True), (1, 2))

    return call


REFUSED = [
    (lambda: layers.Dropout(0.5), "dropout"),
    (lambda: layers.Dropout(0.5, name="d"), "dropout"),
    (lambda: layers.SpatialDropout2D(0.5), "dropout"),
    (lambda: layers.GaussianDropout(0.5), "dropout"),
    (lambda: layers.AlphaDropout(0.5), "dropout"),
    (lambda: layers.BatchNormalization(), NORM),
    (lambda: layers.BatchNormalization(name="own"), NORM),
]


@pytest.mark.parametrize(("make", "name"), REFUSED)
@pytest.mark.parametrize("wrap", [Within, function_of])
@pytest.mark.parametrize("rule", ["gradient", "guided"])
def test_what_is_always_in_training_is_refused_or_listed(make, name, wrap, rule):
    model, x = wrap(make()), tf.constant(X)
    model(x)
    with pytest.raises(ut.ModelError, match=f"since these acted: {name} x1; a layer within is called with training"):
        ut.explain(model, x, rule=rule)
    assert ut.explain(model, x, rule=rule, training=True).acting == {name: 1}


@pytest.mark.parametrize(
    ("make", "acting"),
    [
        (lambda: layers.GaussianNoise(0.5), {NORMAL: 1}),
        (lambda: layers.RandomFlip(), {UNIFORM: 1}),
        (lambda: layers.LayerNormalization(), {}),
        (lambda: layers.GroupNormalization(2), {}),
    ],
)
def test_noise_by_design_is_listed_and_norms_of_a_sample_are_not(make, acting):
    assert ut.explain(Within(make()), X).acting == acting


@pytest.mark.parametrize("make", [make for make, _ in REFUSED])
def test_nothing_acts_out_of_training(make):
    assert ut.explain(Within(make(), always=False), X).acting == {}


def test_the_models_own_training_is_listed():
    stack = [layers.BatchNormalization(), layers.ReLU(), layers.Dropout(0.5), layers.Flatten(), layers.Dropout(0.2)]
    net = keras.Sequential([keras.Input(X.shape[1:]), *stack, layers.Dense(2)])
    assert ut.explain(net, X).acting == {}
    assert ut.explain(net, X, training=True).acting == {"dropout": 2, NORM: 1}
    assert ut.explain(net, X, training=True, estimator="smoothgrad:2").acting == {"dropout": 2, NORM: 1}


def test_what_acts_in_a_called_function_is_seen():
    drop = tf.function(lambda x: tf.nn.dropout(x, 0.5), autograph=False)
    with pytest.raises(ut.ModelError, match="dropout x1"):
        ut.explain(lambda x: tf.reduce_mean(drop(tf.nn.relu(x)), (1, 2)), tf.constant(X))


def test_random_numbers_of_every_kind_are_seen():
    generator = tf.random.Generator.from_seed(1)
    for draw, name in (
        (lambda x: tf.random.normal(x.shape), "RandomStandardNormal"),
        (lambda x: tf.random.stateless_uniform(x.shape, [1, 2]), UNIFORM),
        (lambda x: generator.normal(x.shape), NORMAL),
        (lambda x: tf.random.truncated_normal(x.shape), "TruncatedNormal"),
    ):
        a = ut.explain(lambda x, draw=draw: tf.reduce_mean(tf.nn.relu(x + draw(x)), (1, 2)), tf.constant(X))
        assert a.acting == {name: 1}


def test_what_acts_in_a_loop_is_seen():
    def call(x):
        return tf.reduce_mean(tf.while_loop(lambda i, h: i < 2, lambda i, h: (i + 1, tf.nn.dropout(h, 0.5)), (0, x))[1],
                              (1, 2))  # fmt: skip

    with pytest.raises(ut.ModelError, match="dropout x1"):
        ut.explain(call, tf.constant(X), rule="gradient")


def test_a_second_heads_dropout_is_no_affair_of_the_first():
    drop = layers.Dropout(0.5)

    def call(x):
        h = tf.reduce_mean(tf.nn.relu(x), (1, 2))
        return h, drop(h, training=True)

    assert ut.explain(call, tf.constant(X)).acting == {}
    with pytest.raises(ut.ModelError, match="dropout"):
        ut.explain(call, tf.constant(X), output=1)


@pytest.mark.parametrize("make", ["fused", "by hand", "masked"])
def test_batch_norm_of_every_make_is_seen(make):
    ones = tf.ones(4)
    masked, mask = layers.BatchNormalization(), np.array([[True, False, True]] * 3)
    masked.build((3, 3, 4))
    fused = tf.function(lambda x: tf.compat.v1.nn.fused_batch_norm(x, ones, ones, is_training=True)[0])
    call = {
        "fused": lambda x: fused(tf.nn.relu(x))[:, 0, 0],
        "by hand": lambda x: tf.nn.batch_normalization(x, *tf.nn.moments(x, (0, 1, 2)), None, None, 1e-3)[:, 0, 0],
        "masked": lambda x: masked(tf.nn.relu(x)[:, 0, :3], training=True, mask=mask)[:, 0],
    }[make]
    with pytest.raises(ut.ModelError, match=f"{NORM} x1"):
        ut.explain(call, tf.constant(X), rule="gradient")


def test_a_refused_call_leaves_the_next_as_it_is():
    model = Within(layers.Dropout(0.5, seed=1))
    model(X)
    for _ in range(2):
        with pytest.raises(ut.ModelError, match="dropout"):
            ut.explain(model, X)
        assert ut.explain(model, X, training=True).acting == {"dropout": 1}
