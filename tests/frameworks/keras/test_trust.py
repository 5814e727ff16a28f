"""Verdicts, Grad-CAM and layers initialised anew, of Keras networks on TensorFlow."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import undertow as ut
from undertow.frameworks.base import Request, capability
from undertow.frameworks.keras.explain import tracing
from undertow.frameworks.keras.inspect import layers as inspector
from undertow.frameworks.keras.layers import named_modules
from undertow.frameworks.keras.watching import wrapped
from undertow.rules import RULES, relu


def network() -> keras.Model:
    """A nested model, a layer that runs twice, and a softmax."""
    keras.utils.set_random_seed(7)
    inner = keras.Sequential(
        [
            keras.Input((10, 14, 4)),
            layers.Conv2D(6, 3, activation="relu", name="conv"),
            layers.BatchNormalization(name="norm"),
        ],
        name="inner",
    )
    shared = layers.Conv2D(6, 3, padding="same", activation="relu", name="shared")
    x = keras.Input((12, 16, 3))
    h = inner(layers.Conv2D(4, 3, activation="relu", name="first")(x))
    h = layers.GlobalAveragePooling2D()(shared(shared(h)))
    return keras.Model(x, layers.Dense(5, activation="softmax", name="head")(h))


@pytest.fixture(scope="module")
def net():
    return network()


@pytest.fixture
def x():
    return np.random.default_rng(5).normal(size=(2, 12, 16, 3)).astype(np.float32)


def pieces(net):
    """The network as one function after another; the last one ends before the softmax."""
    layer, head = net.get_layer, net.get_layer("head")
    inner = layer("inner")
    return [
        layer("first"),
        inner.get_layer("conv"),
        inner.layers[-1],
        layer("shared"),
        layer("shared"),
        lambda h: tf.reduce_mean(h, (1, 2)) @ head.kernel + head.bias,
    ]


def cam_by_hand(net, x, depth, ids):
    """Grad-CAM under a tape: equations 1 and 2 of arXiv 1610.02391, at the output of the first `depth` pieces."""
    functions = pieces(net)
    value = tf.constant(x)
    for function in functions[:depth]:
        value = function(value)
    with tf.GradientTape() as tape:
        tape.watch(value)
        scores = value
        for function in functions[depth:]:
            scores = function(scores)
        explained = tf.gather(scores, ids, axis=1, batch_dims=1)
    weights = tf.reduce_mean(tape.gradient(explained, value), (1, 2), keepdims=True)
    plane = tf.nn.relu(tf.reduce_sum(weights * value, -1, keepdims=True))
    return tf.image.resize(plane, x.shape[1:3]).numpy()


@pytest.mark.parametrize(
    ("layer", "depth"),
    [("first", 1), ("inner.conv", 2), ("inner", 3), ("shared@1", 5), ("inner.norm", 3)],
)
def test_grad_cam_of_any_layer_equals_a_tape(net, x, layer, depth):
    a = ut.explain(net, x, rule="gradient", estimator=f"grad-cam:{layer}", target=[1, 3])
    expected = cam_by_hand(net, x, depth, [1, 3])
    assert a.values.shape == (2, 12, 16, 1)
    assert np.abs(a.values - expected).max() <= 1e-6 * expected.max()
    assert a.image(0).size == (16, 12)


def test_grad_cam_of_all_calls_of_a_layer_and_of_several_targets(net, x):
    one, both = (
        ut.explain(net, x, rule="gradient", estimator=f"grad-cam:shared{call}", target=2).values for call in ("@1", "")
    )
    assert not np.allclose(one, both)
    a = ut.explain(net, x, rule="gradient", estimator="grad-cam:inner", target=[[1, 2], [3, 4]])
    assert a.values.shape == (2, 2, 12, 16, 1)
    assert np.allclose(a.values[:, 1], cam_by_hand(net, x, 3, [2, 4]), atol=1e-7)
    guided = ut.explain(net, x, estimator="guided-grad-cam:inner", target=[1, 3])
    plain = ut.explain(net, x, target=[1, 3])
    assert np.allclose(guided.values, plain.values * cam_by_hand(net, x, 3, [1, 3]), atol=1e-7)


def test_layers_that_are_not_there_are_named(net, x):
    with pytest.raises(ut.InputError, match="no layer 'innre'; did you mean inner"):
        ut.explain(net, x, estimator="grad-cam:innre")
    with pytest.raises(ut.InputError, match=r"layers are those of a keras\.Model"):
        ut.explain(lambda v: tf.reduce_mean(v, (1, 2)), tf.constant(x), estimator="grad-cam:first")
    hidden = keras.Sequential([keras.Input((12, 16, 3)), layers.Conv2D(2, 3, name="seen")], name="inner")
    inner = tf.function(lambda v: hidden.get_layer("seen")(v))

    class Around(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = hidden

        def call(self, v):
            return tf.reduce_mean(inner(v), (1, 2))

    model = Around()
    model(x)
    with pytest.raises(ut.InputError, match=r"layer 'inner.seen' runs in a tf.function or a loop of its own"):
        ut.explain(model, x, rule="gradient", estimator="grad-cam:inner.seen")


@pytest.mark.parametrize("rule", ["gradient", "deconvnet", "guided"])
def test_gradients_at_a_layer_are_maps_of_what_follows_it(net, x, rule):
    whole = ut.explain(net, x, rule=rule, target=2)
    functions = pieces(net)
    value = functions[2](functions[1](functions[0](tf.constant(x))))

    def rest(v):
        for function in functions[3:]:
            v = function(v)
        return v

    expected = ut.explain(rest, value, rule=rule, target=2)
    found = inspector.layer_gradients(
        Request(net, (x,), RULES[rule], rule, 2, "graph", "relu-like", False), ["inner", "first"]
    )
    assert np.allclose(found.gradients["inner"][:, 0], expected.values, atol=1e-7)
    assert np.allclose(found.values["inner"], value, atol=1e-6)
    assert np.array_equal(found.at_input[:, 0], whole.values)
    assert found.explanation.stats.rewired == whole.rewired
    assert found.reached == {"inner": frozenset({0}), "first": frozenset({0})}


def test_layers_with_weights_come_in_the_order_in_which_they_run(net, x):
    assert [name.split(".")[-1][:5] for name in inspector.layers(net, x)] == ["first", "conv", "norm", "share", "head"]
    expected = tf.constant(x)
    for function in pieces(net):
        expected = function(expected)
    assert np.allclose(inspector.scores(net, x), expected, atol=1e-5)
    assert inspector.layers(lambda v: tf.reduce_mean(v, (1, 2)), x) == []


class Scale(layers.Layer):
    """A layer whose class says nothing of how it is made."""

    def __init__(self, values):
        super().__init__(name="scale")
        self.factor = self.add_weight(shape=(len(values),), initializer="zeros")
        self.factor.assign(values)

    def call(self, x):
        return x * self.factor


def test_layers_are_drawn_anew_as_their_own_initialisers_would(x):
    constant = keras.initializers.Constant(2.0)
    net = keras.Sequential(
        [
            keras.Input((12, 16, 3)),
            layers.Conv2D(4, 3, kernel_initializer=keras.initializers.RandomUniform(5, 6, seed=1), name="uniform"),
            layers.BatchNormalization(name="norm"),
            Scale([1.0, 2.0, 3.0, 4.0]),
            layers.Flatten(),
            layers.Dense(3, kernel_initializer="he_normal", bias_initializer=constant, name="head"),
        ]
    )
    net.set_weights([np.random.default_rng(3).normal(size=w.shape).astype("float32") ** 2 for w in net.get_weights()])
    before = [w.copy() for w in net.get_weights()]
    names = ["uniform", "norm", "scale", "head"]
    twin = inspector.reinitialized(net, names, 0)

    def values(twin, name):
        return [twin._variables[id(v.handle)].numpy() for v in net.get_layer(name).weights]

    kernel, bias = values(twin, "uniform")
    assert 5 <= kernel.min() < kernel.max() <= 6
    assert not bias.any()
    assert [np.unique(v).tolist() for v in values(twin, "norm")] == [[1.0], [0.0], [0.0], [1.0]]
    assert sorted(values(twin, "scale")[0]) == sorted(net.get_layer("scale").factor.numpy())
    kernel, bias = values(twin, "head")
    assert (bias == 2).all()
    assert 0.8 < kernel.std() / np.sqrt(2 / kernel.shape[0]) < 1.1
    again, other = inspector.reinitialized(net, ["head"], 0), inspector.reinitialized(net, names, 1)
    assert np.array_equal(values(again, "head")[0], kernel)  # whatever else is drawn
    assert not np.array_equal(values(other, "uniform")[0], values(twin, "uniform")[0])
    assert all(np.array_equal(a, b) for a, b in zip(before, net.get_weights(), strict=True))


def test_a_network_with_a_layer_anew_equals_a_clone_with_its_weights(net, x):
    ut.explain(net, x, rule="guided", target=2)
    twin = inspector.reinitialized(net, ["inner.conv"], 4)
    clone = keras.models.clone_model(net)
    clone.set_weights(net.get_weights())
    old, new = (model.get_layer("inner").get_layer("conv").weights for model in (net, clone))
    for mine, theirs in zip(old, new, strict=True):
        theirs.assign(twin._variables[id(mine.handle)])
    for estimator in ("gradient", "grad-cam:inner"):
        a, b = (ut.explain(model, x, rule="guided", target=2, estimator=estimator).values for model in (twin, clone))
        assert np.array_equal(a, b)
        assert not np.array_equal(a, ut.explain(net, x, rule="guided", target=2, estimator=estimator).values)
    assert np.array_equal(twin(x), clone(x))  # another library's map may be of it
    with tf.GradientTape() as tape:
        source = tf.constant(x)
        tape.watch(source)
        score = tf.reduce_sum(twin(source)[:, 1])
    assert np.abs(tape.gradient(score, source)).max() > 0
    assert np.array_equal(inspector.scores(twin, x), inspector.scores(clone, x))


def test_a_verdict_answers_all_questions_and_changes_nothing(net, x, monkeypatch):
    weights = [w.copy() for w in net.get_weights()]
    traces, trace = [], tracing.trace
    monkeypatch.setattr(tracing, "trace", lambda *args: traces.append(args) or trace(*args))
    verdict = ut.trust(net, x[:1], rule="guided", seed=3)
    assert (len(verdict.answers), verdict.unanswered) == (6, {})
    assert len(traces) <= 3  # one a size of batch, for all rules and all weights
    assert verdict.values.shape == (3, 12, 16)
    again = ut.trust(net, x[:1], rule="guided", seed=3)
    assert again.to_dict()["answers"] == verdict.to_dict()["answers"]
    assert all(np.array_equal(a, b) for a, b in zip(weights, net.get_weights(), strict=True))
    assert verdict.answers["weights"].numbers["layers"] == 5
    cam = ut.trust(net, x[:1], rule="gradient", estimator="grad-cam:inner")
    assert (len(cam.answers), cam.unanswered) == (6, {})


def test_a_map_of_another_tool(net, x):
    def saliency(model, images, ids):
        with tf.GradientTape() as tape:
            source = tf.convert_to_tensor(images)
            tape.watch(source)
            score = tf.gather(model(source), ids, axis=1, batch_dims=1)
        return np.abs(tape.gradient(score, source)).max(-1)

    verdict = ut.trust.of_map(net, x[:1], saliency(net, x[:1], [2])[0], explainer=saliency, target=2)
    assert set(verdict.answers) == {"class", "weights", "stability", "input", "faithfulness"}
    whole = np.arange(12 * 16 * 3, dtype=float).reshape(12, 16, 3)
    assert np.array_equal(ut.trust.of_map(net, x[:1], whole).values, np.moveaxis(whole, -1, 0))
    with pytest.raises(ut.InputError, match=r"maps have shape \(1, 3, 12, 16\); they must be \(1, 12, 16, channels\)"):
        ut.trust.of_map(net, x[:1], np.ones((1, 3, 12, 16)))


# one trace for all rules


def test_one_trace_serves_all_rules(x, monkeypatch):
    net = network()
    traces, trace = [], tracing.trace
    monkeypatch.setattr(tracing, "trace", lambda *args: traces.append(args) or trace(*args))
    found = {rule: ut.explain(net, x, rule=rule, target=1) for rule in ("guided", "gradient", "deconvnet")}
    assert len(traces) == 1
    assert [a.rewired for a in found.values()] == [4, 0, 4]
    spelled = {
        "guided": lambda g, local: local(relu(g)),
        "gradient": lambda g, local: local(g),
        "deconvnet": lambda g, local: relu(g),
    }
    for rule, a in found.items():  # a function of one's own has a trace of its own, without a switch
        assert np.array_equal(a.values, ut.explain(net, x, rule=spelled[rule], target=1).values)
    assert len(traces) == 4


def test_the_plain_gradient_needs_no_activation(x):
    linear = keras.Sequential([keras.Input((12, 16, 3)), layers.Flatten(), layers.Dense(3)])
    for _ in range(2):
        assert ut.explain(linear, x, rule="gradient", target=0).rewired == 0
        with pytest.raises(ut.RuleError, match="found no activation"):
            ut.explain(linear, x, rule="guided", target=0)


# layers watched


def test_watchers_may_end_in_any_order(net):
    layer, seen = net.get_layer("first"), []

    def around(name, layer, call, args, kwargs):
        seen.append(name)
        return call(*args, **kwargs)

    first, second = wrapped({"a": layer}, around), wrapped({"b": layer}, around)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    layer(np.ones((1, 12, 16, 3), "float32"))
    assert seen == ["b"]
    second.__exit__(None, None, None)
    assert "call" not in vars(layer)


def test_threads_do_not_meet(net, x):
    expected = ut.explain(net, x, rule="gradient", estimator="grad-cam:inner", target=1).values
    found = []

    def work(k):
        a = ut.explain(net, x, rule="gradient", estimator="grad-cam:inner", target=[[1, k]] * 2)
        found.append(np.allclose(a.values[:, 0], expected, atol=1e-7))

    threads = [threading.Thread(target=work, args=(k,)) for k in (0, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4
    assert not any("call" in vars(named.module) for named in named_modules(net))


def test_the_framework_has_a_look_at_layers():
    assert capability("keras", "inspect.layers").channels_last(None, None)
