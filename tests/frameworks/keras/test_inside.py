"""Maps at a layer's output and of a unit inside a Keras network on TensorFlow."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import undertow as ut


@pytest.fixture(scope="module")
def net():
    keras.utils.set_random_seed(7)
    inner = [keras.Input((10, 14, 4)), layers.Conv2D(6, 3, activation="relu", name="conv")]
    inner = keras.Sequential([*inner, layers.BatchNormalization(name="norm")], name="inner")
    shared = layers.Conv2D(6, 3, padding="same", activation="relu", name="shared")
    x = keras.Input((12, 16, 3))
    h = shared(shared(inner(layers.Conv2D(4, 3, activation="relu", name="first")(x))))
    return keras.Model(x, layers.Dense(5, activation="softmax", name="head")(layers.Flatten(name="flat")(h)))


@pytest.fixture
def x():
    return np.random.default_rng(5).normal(size=(2, 12, 16, 3)).astype(np.float32)


def halves(net, x):
    """The output of the nested model, and what follows it up to before the softmax."""
    layer, head = net.get_layer, net.get_layer("head")

    def rest(h):
        return layer("flat")(layer("shared")(layer("shared")(h))) @ head.kernel + head.bias

    return layer("inner")(layer("first")(x)), rest


@pytest.mark.parametrize("rule", ["gradient", "deconvnet", "guided"])
def test_at_a_layer_the_map_is_of_what_follows(net, x, rule):
    value, rest = halves(net, x)
    a = ut.explain(net, x, rule=rule, at="inner", target=2)
    expected = ut.explain(rest, value, rule=rule, target=2)
    assert isinstance(a.values, np.ndarray)
    assert np.allclose(a.values, expected.values, atol=1e-7)
    assert np.allclose(a.scores, expected.scores, atol=1e-6)
    other = ut.explain(net, x[::-1].copy(), rule=rule, at="inner", target=2)  # no graph of the first image is kept
    assert np.allclose(other.values, a.values[::-1], atol=1e-7)


def test_calls_estimators_and_embeddings(net, x):
    both = ut.explain(net, x, rule="gradient", at="shared", target=1).values
    second = ut.explain(net, x, rule="gradient", at="shared@1", target=1).values
    assert list(both) == ["shared", "shared@1"]
    assert np.array_equal(both["shared@1"], second)
    value, rest = halves(net, x)
    times = ut.explain(net, tf.constant(x), rule="gradient", at="inner", target=2, estimator="input-times")
    plain = ut.explain(rest, value, rule="gradient", target=2)
    assert np.allclose(times.values, plain.values * value, atol=1e-6)
    embed = layers.Embedding(9, 4, name="embed")
    text = keras.Sequential([keras.Input((5,), dtype="int32"), embed, layers.Flatten(), layers.Dense(3)])
    ids = np.array([[1, 4, 2, 2, 0]])
    tokens = ut.explain(text, ids, rule="gradient", at="embed", target=1)
    assert tokens.values.shape == (1, 5, 4)
    assert np.allclose(tokens.values.reshape(-1), text.layers[-1].kernel.value.numpy()[:, 1])
    assert tokens.token_ids.tolist() == ids.tolist()


def test_a_unit_inside(net, x):
    def of(function):
        with tf.GradientTape() as tape:
            source = tf.constant(x)
            tape.watch(source)
            score = tf.reduce_sum(function(net.get_layer("inner")(net.get_layer("first")(source))))
        return tape.gradient(score, source).numpy()

    whole = ut.explain(net, x, rule="gradient", target=ut.targets.unit("inner", 4))
    assert np.allclose(whole.values, of(lambda h: h[..., 4]), atol=1e-7)
    assert whole.targets is None
    place = ut.explain(net, x, rule="gradient", target=ut.targets.unit("inner", 4, (1, -2)))
    assert np.allclose(place.values, of(lambda h: h[:, 1, -2, 4]), atol=1e-7)
    assert ut.explain(net, x, target=ut.targets.unit("inner.norm", 4)).rewired == 2
    with pytest.raises(ut.TargetError, match="layer 'inner' has channels 0 to 5; there is no 6"):
        ut.explain(net, x, target=ut.targets.unit("inner", 6))
    with pytest.raises(ut.InputError, match="no layer 'innre'; did you mean inner"):
        ut.explain(net, x, at="innre")
    with pytest.raises(ut.InputError, match=r"runs 1 time\(s\)"):
        ut.explain(net, x, at="inner@1")
