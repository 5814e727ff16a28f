"""What explain promises for Keras beyond the numbers: targets, refusals, a cache, and a model left as it was."""

import gc
import json
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import undertow as ut
from undertow.frameworks.keras.explain import tracing
from undertow.frameworks.keras.internals import all_layers

KNOWN = json.loads(Path(__file__).parents[2].joinpath("vectors", "known_answers.json").read_text())


def small(seed: int = 0) -> keras.Sequential:
    numbers = np.random.default_rng(seed)
    hidden = [layers.Dense(8, activation="relu"), layers.Dense(8), layers.ReLU()]
    net = keras.Sequential([keras.Input((4,)), *hidden, layers.Dense(5)])
    net.set_weights([numbers.normal(size=w.shape) for w in net.get_weights()])
    return net


@pytest.fixture(scope="module")
def net():
    return small()


@pytest.fixture
def x():
    return np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)


@pytest.fixture
def traces(monkeypatch):
    """How often a graph was traced."""
    calls, trace = [], tracing.trace
    monkeypatch.setattr(tracing, "trace", lambda *args: calls.append(args) or trace(*args))
    return calls


# known answers


@pytest.mark.parametrize("rule", ["gradient", "deconvnet", "guided"])
def test_figure_1_of_springenberg(rule):
    figure = KNOWN["springenberg_2014_figure_1"]
    x, g, expected = (np.array(figure[name], np.float64) for name in ("forward_input", "gradient_above", rule))
    a = ut.explain(tf.nn.relu, tf.constant(x[None]), rule=rule, target=lambda y: tf.reduce_sum(y * g, (1, 2)))
    assert np.array_equal(a.numpy()[0], expected)
    assert a.targets is None


@pytest.mark.parametrize("through", ["graph", "swap"])
@pytest.mark.parametrize("rule", ["gradient", "deconvnet", "guided"])
def test_one_convolution(rule, through):
    answers = KNOWN["one_convolution"]
    hidden = [layers.Conv2D(2, 3, activation="relu"), layers.Permute((3, 1, 2)), layers.Flatten()]
    net = keras.Sequential([keras.Input((4, 4, 1)), *hidden, layers.Dense(4, activation="relu")])
    rows = np.array([1.0, 1, 1, 1, 1, -1, -1, -1])[:, None].repeat(4, 1)
    net.set_weights([np.ones((3, 3, 1, 2)), np.array([-50.0, -75.0]), rows, np.zeros(4)])
    x = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    a = ut.explain(net, x, rule=rule, target=answers["target"], through=through)
    assert a.values[0, ..., 0].tolist() == answers[rule]
    assert a.rewired == (0 if rule == "gradient" else 2)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
@pytest.mark.parametrize(
    ("activation", "derivative"),  # at -3, -1, -0.25, 0.25, 0.75, 3, 7
    [
        (layers.ReLU(), [0, 0, 0, 1, 1, 1, 1]),
        (layers.ReLU(max_value=6.0), [0, 0, 0, 1, 1, 1, 0]),
        (layers.ReLU(max_value=2.0), [0, 0, 0, 1, 1, 0, 0]),
        (layers.ReLU(negative_slope=0.25), [0.25, 0.25, 0.25, 1, 1, 1, 1]),
        (layers.ReLU(threshold=0.5), [0, 0, 0, 0, 1, 1, 1]),
        (layers.ReLU(max_value=2.0, negative_slope=0.25, threshold=0.5), [0.25, 0.25, 0.25, 0.25, 1, 0, 0]),
        (layers.LeakyReLU(0.5), [0.5, 0.5, 0.5, 1, 1, 1, 1]),
    ],
    ids=["relu", "relu6", "max_value", "negative_slope", "threshold", "all_three", "leaky"],
)
def test_one_relu_in_every_precision(activation, derivative, dtype):
    x = tf.constant([[-3, -1, -0.25, 0.25, 0.75, 3, 7]], dtype)
    activation = type(activation).from_config({**activation.get_config(), "dtype": dtype})
    g, slope = np.array([2.0, -2, 4, -4, 2, -8, 16]), np.array(derivative)
    expected = {"gradient": g * slope, "deconvnet": np.maximum(g, 0), "guided": np.maximum(g, 0) * slope}
    for rule, values in expected.items():
        a = ut.explain(activation, x, rule=rule, target=lambda y: tf.reduce_sum(y * tf.cast(g, dtype), 1))
        assert a.values.dtype == dtype
        assert a.numpy()[0].tolist() == values.tolist(), rule
        assert a.rewired == (rule != "gradient")


# targets


def test_no_target_is_each_samples_predicted_class(net, x):
    a = ut.explain(net, x)
    scores = net(x).numpy()
    assert a.targets.tolist() == scores.argmax(1).tolist()
    assert np.allclose(a.scores, scores.max(1), rtol=1e-6)
    assert np.array_equal(a.values, ut.explain(net, x, target=scores.argmax(1)).values)


def test_several_targets(net, x):
    ids = [[0, 4], [1, 1], [2, 3]]
    a = ut.explain(net, x, target=ids)
    assert a.values.shape == (3, 2, 4)
    assert a.targets.tolist() == ids
    for k in range(2):
        alone = ut.explain(net, x, target=np.array(ids)[:, k])
        assert np.allclose(a.values[:, k], alone.values, rtol=1e-6)
        assert np.allclose(a.scores[:, k], alone.scores, rtol=1e-6)
    top = ut.explain(net, x, target="top:3")
    assert top.targets.tolist() == np.argsort(-net(x).numpy(), 1)[:, :3].tolist()
    assert top.values.shape == (3, 3, 4)


def test_a_function_of_the_output_is_never_stale(net, x):
    both = ut.explain(net, x, target=[[0, 1]] * 3, rule="gradient").values
    weights = [1.0]

    def weighted(out):
        return weights[0] * out[:, 0] - out[:, 1]

    for weights[0] in (1.0, 2.0):
        a = ut.explain(net, x, target=weighted, rule="gradient")
        assert np.allclose(a.values, weights[0] * both[:, 0] - both[:, 1], atol=1e-5)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (5, "target 5 is out of range: the model has classes 0 to 4"),
        (-1, "target -1 is out of range"),
        ([0, 1], r"shape \(2,\) for a batch of 3"),
        (1.5, "class ids are integers"),
        (True, "class ids are integers"),
        ("top:9", "more classes than the model has"),
        ("cat", "'top:K', or a classifier of ut.load"),
        ([[0], [1, 2], [3]], "not understood"),
        (lambda out: out, "one score for each sample"),
        (lambda out: 3, "one score for each sample"),
    ],
)
def test_a_wrong_target_is_refused(net, x, target, message):
    with pytest.raises(ut.TargetError, match=message):
        ut.explain(net, x, target=target)


# inputs and outputs


def test_arrays_are_answered_with_arrays_and_tensors_with_tensors(net, x):
    array, tensor = ut.explain(net, x), ut.explain(net, tf.constant(x))
    assert {type(v) for v in (array.values, array.targets, array.scores)} == {np.ndarray}
    assert all(isinstance(v, tf.Tensor) for v in (tensor.values, tensor.targets, tensor.scores))
    assert np.array_equal(tensor.numpy(), array.values)


def test_a_tuple_of_inputs_gives_a_tuple_and_integers_get_no_map(net, x):
    table = np.random.default_rng(2).normal(size=(6, 4)).astype(np.float32)
    ids = tf.constant([1, 2, 5])
    a = ut.explain(lambda v, i: net(v + tf.gather(table, i)), (tf.constant(x), ids), target=1)
    assert a.values[1] is None
    assert np.allclose(a.numpy()[0], ut.explain(net, x + table[ids.numpy()], target=1).values, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "x", "error", "message"),
    [
        (tf.nn.relu, np.ones((1, 2)), ut.InputError, "torch.from_numpy"),
        (tf.nn.relu, tf.ones((2, 2), tf.int32), ut.InputError, "tf.cast"),
        (tf.nn.relu, tf.ones((2, 2), tf.complex64), ut.InputError, "tf.math.real"),
        (tf.nn.relu, keras.Input((3,)), ut.InputError, "KerasTensor"),
        (tf.add, (tf.ones((2, 2)), tf.ones((3, 2))), ut.InputError, "first .batch. axis"),
        (tf.stop_gradient, tf.ones((1, 2)), ut.InputError, "do not depend on x"),
        (lambda v, w: tf.nn.relu(v), (tf.ones((1, 2)), tf.ones((1, 2))), ut.InputError, "input 1 does not influence"),
        (lambda v: 3, tf.ones((1, 2)), ut.ModelError, "the model returned a int"),
        (lambda v: tf.cast(v, tf.int64), tf.ones((1, 2)), ut.ModelError, "int64 scores"),
        (lambda v: tf.reduce_sum(v, 1), tf.ones((2, 2)), ut.ModelError, "pass target=lambda"),
        (lambda v: tf.nn.relu(v) * np.nan, tf.ones((2, 2)), ut.ModelError, "sample 0 is nan"),
    ],
)
def test_what_cannot_be_explained_is_refused(model, x, error, message):
    with pytest.raises(error, match=message):
        ut.explain(model, x)


def test_a_model_that_fails_keeps_its_error_and_gains_the_shape(net, x):
    with pytest.raises(ValueError, match="incompatible") as caught:
        ut.explain(net, x[:, :3])
    assert any("(3, 3) float32" in note for note in caught.value.__notes__)


def test_a_symbolic_tensor_is_refused(net):
    @tf.function(autograph=False)
    def inside(v):
        return ut.explain(net, v).values

    with pytest.raises(ut.InputError, match="symbolic tensor"):
        inside(tf.ones((1, 4)))


def test_images_are_drawn_whatever_their_layout(tmp_path):
    net = keras.Sequential([keras.Input((6, 8, 3)), layers.Conv2D(4, 3, activation="relu"), layers.Flatten()])
    x = np.random.default_rng(3).normal(size=(2, 6, 8, 3)).astype(np.float32)
    a = ut.explain(net, x, target="top:2")
    assert a.channels_last
    assert a.numpy().shape == a.numpy(channels_last=True).shape == (2, 2, 6, 8, 3)
    assert np.array_equal(a.map(1, 1), a.values[1, 1].transpose(2, 0, 1))
    assert a.image(0, 1).size == (8, 6)
    assert a.save(tmp_path / "map.safetensors").stat().st_size > a.values.nbytes


# refusals


@tf.custom_gradient
def own(v):
    return tf.nn.relu(v), lambda g: g * tf.cast(v > 0, g.dtype)


def test_a_custom_gradient_is_listed(net, x):
    with pytest.warns(ut.UndertowWarning, match="left alone on the way, as .*: CustomGradient x1"):
        assert ut.explain(lambda v: net(v + own(v)), tf.constant(x)).opaque == {"CustomGradient": 1}
    with pytest.raises(ut.RuleError, match=r"CustomGradient x1.*no rule reaches"):
        ut.explain(own, tf.constant(x))


def test_smooth_activations_are_listed_or_taken(x):
    stack = [layers.Dense(4, activation=name) for name in ("gelu", "relu", "sigmoid", None)]
    net = keras.Sequential([keras.Input((4,)), *stack])
    with pytest.warns(ut.UndertowWarning, match="Gelu x1, Sigmoid x1; activations='all' takes the smooth ones"):
        assert ut.explain(net, x).skipped == {"Gelu": 1, "Sigmoid": 1}
    with pytest.warns(ut.UndertowWarning, match="them: Sigmoid x1$"):
        every = ut.explain(net, x, activations="all")
    assert (every.rewired, every.skipped) == (2, {"Sigmoid": 1})
    with pytest.raises(ut.RuleError, match="activations='all' takes the smooth ones"):
        ut.explain(keras.Sequential([keras.Input((4,)), stack[0]]), x)


def test_switches_are_counted():
    for pool, shape in [(layers.MaxPooling1D(), (8, 3)), (layers.MaxPooling2D(), (8, 6, 3))]:
        net = keras.Sequential([keras.Input(shape), layers.ReLU(), pool, layers.Flatten()])
        assert ut.explain(net, np.ones((1, *shape), np.float32)).switches == 1


def test_what_hides_a_computation_is_refused(net, x):
    loop = keras.Sequential([keras.Input((3, 4)), layers.SimpleRNN(5, activation="relu")])
    with pytest.raises(ut.RuleError, match=r"While.*unroll=True"):
        ut.explain(loop, np.ones((1, 3, 4), np.float32))
    assert ut.explain(loop, np.ones((1, 3, 4), np.float32), rule="gradient").values.shape == (1, 3, 4)
    tensor = tf.constant(x)
    hidden = {
        "tf.py_function runs Python": lambda v: tf.ensure_shape(tf.py_function(net, [v], tf.float32), (3, 5)),
        "a branch keeps its body": lambda v: tf.cond(v[0, 0] > 0, lambda: net(v), lambda: net(2 * v)),
        "recompute_grad and keras.RematScope": lambda v: tf.recompute_grad(lambda w: tf.nn.relu(w) * net(w)[:, :4])(v),
    }
    for message, model in hidden.items():
        with pytest.raises(ut.RuleError, match=message):
            ut.explain(model, tensor)


def test_hooks_are_torchs(net, x):
    with pytest.raises(ut.RuleError, match="no backward hooks"):
        ut.explain(net, x, through="hook")


def test_a_missed_call_is_placed(x):
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.body, self.head = layers.Dense(4, activation="relu"), layers.Dense(2, name="head")

        def call(self, v):
            return self.head(tf.nn.relu(self.body(v)))

        def get_config(self):
            return {}

    net = Net()
    net(x)
    with pytest.raises(ut.RuleError, match=r"missed 1 activation call.s.: net.*/Relu; through='graph'"):
        ut.explain(net, x, through="swap")
    assert ut.explain(net, x).rewired == 2


@pytest.mark.parametrize("through", ["graph", "swap"])
def test_a_rule_that_breaks_its_contract_is_named(net, x, through):
    for bad in (lambda g, local: g[:1], lambda g, local: local(g[:1]), lambda g, local: None):
        with pytest.raises(ut.RuleError, match="lambda"):
            ut.explain(net, x, rule=bad, through=through)


ON_TORCH = """
import numpy as np, torch, keras, undertow as ut
x = np.ones((2, 4), "float32")
net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="relu")]).eval()
print(ut.explain(net, torch.from_numpy(x)).rewired)
try:
    ut.explain(net, x)
except ut.InputError as error:
    print(error)
layers = [keras.Input((12, 20, 3)), keras.layers.Conv2D(4, 3), keras.layers.Flatten(), keras.layers.Dense(2)]
images, net = torch.rand(1, 12, 20, 3), keras.Sequential(layers).eval()
attribution = ut.explain(net, images, rule="gradient", target=0)
print(attribution.image(0).size, attribution.numpy(channels_last=True).shape)
"""


def test_keras_on_torch_goes_to_torchs_side():
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    done = subprocess.run([sys.executable, "-c", ON_TORCH], env=environment, capture_output=True, text=True, check=True)
    rewired, numpy_refused, layout = done.stdout.splitlines()
    assert rewired == "1"
    assert "use torch.from_numpy(x)" in numpy_refused
    assert layout == "(20, 12) (1, 12, 20, 3)"


def test_keras_on_other_backends_is_refused(net, x, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "openvino")  # which is not among the packages of the tests
    with pytest.raises(ut.FrameworkError, match=r"keras runs on openvino here.*KERAS_BACKEND=tensorflow"):
        ut.explain(net, x)


# cached graphs


def test_the_second_call_costs_no_trace(net, x, traces):
    net = small()
    first = ut.explain(net, x)
    for _ in range(3):
        assert np.array_equal(ut.explain(net, x).values, first.values)
    assert len(traces) == 1
    ut.explain(net, x, target=[1, 2, 3])
    ut.explain(net, x + 1, target=4)  # other ids, and one for all, are no other graph
    assert len(traces) == 2
    ut.explain(net, x[:2])
    ut.explain(net, x, activations="all")
    assert len(traces) == 4
    assert ut.explain(net, x).rewired == first.rewired == 2


def test_new_weights_count_at_once(x, traces):
    net, other = small(0), small(1)
    before = ut.explain(net, x, target=1).values
    net.set_weights(other.get_weights())
    after = ut.explain(net, x, target=1).values
    assert len(traces) == 1
    assert not np.allclose(before, after)
    assert np.array_equal(after, ut.explain(other, x, target=1).values)


def test_another_activation_is_another_graph(x, traces):
    net = small()
    assert ut.explain(net, x).rewired == 2
    net.layers[0].activation = keras.activations.linear
    assert ut.explain(net, x).rewired == 1
    net.layers[1].activation = keras.activations.relu6
    assert ut.explain(net, x).rewired == 2
    assert len(traces) == 3


def test_a_thousand_calls_leave_no_objects(x):
    net = small()
    for _ in range(3):
        ut.explain(net, x)
    gc.collect()
    objects, graphs = len(gc.get_objects()), len(tracing.cache)
    for _ in range(1000):
        ut.explain(net, x)
    gc.collect()
    assert len(gc.get_objects()) - objects < 100
    assert len(tracing.cache) == graphs


def test_the_cache_is_bounded_and_keeps_no_model_alive(net, monkeypatch):
    monkeypatch.setattr(tracing, "MAX_GRAPHS", 5)
    for batch in range(1, tracing.MAX_GRAPHS + 4):
        ut.explain(net, np.ones((batch, 4), np.float32), rule="gradient")
    assert len(tracing.cache) == tracing.MAX_GRAPHS
    mine = small()
    ut.explain(mine, np.ones((1, 4), np.float32))
    gone = weakref.ref(mine)
    graphs = len(tracing.cache)
    del mine
    gc.collect()
    assert gone() is None
    assert len(tracing.cache) == graphs - 1


# untouched


def test_the_model_is_as_before(net, x):
    def state():
        return [w.tobytes() for w in net.get_weights()], [(id(v), vars(v).get("activation")) for v in all_layers(net)]

    before, original = state(), x.copy()
    for through in ("graph", "swap"):
        ut.explain(net, x, through=through)
        with pytest.raises(ZeroDivisionError):
            ut.explain(net, x, rule=lambda g, local: 1 / 0, through=through)
    assert state() == before
    assert np.array_equal(x, original)
    with tf.GradientTape() as tape:  # its own gradient is the plain one still
        y = tf.reduce_sum(net(x)[:, 1])
    assert np.abs(tape.gradient(y, net.trainable_variables[0])).sum() > 0


def test_batch_statistics_and_random_states_are_put_back(x):
    stack = [layers.Dense(8), layers.BatchNormalization(), layers.ReLU(), layers.Dropout(0.5, seed=1), layers.Dense(2)]
    net = keras.Sequential([keras.Input((4,)), *stack])
    before = [v.numpy() for v in net.variables]
    quiet = ut.explain(net, x, target=1)
    trained = ut.explain(net, x, target=1, training=True)
    assert not np.allclose(quiet.values, trained.values)
    assert trained.rewired == 1
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(before, net.variables, strict=True))


def test_mixed_precision(x):
    stack = [layers.Dense(8, activation="relu", dtype="mixed_float16"), layers.Dense(2, dtype="float32")]
    a = ut.explain(keras.Sequential([keras.Input((4,)), *stack]), x)
    assert (a.rewired, a.values.dtype) == (1, np.float32)
    assert np.abs(a.values).max() > 0


def test_a_saved_model_is_seen_into(net, x, tmp_path):
    net.export(tmp_path / "saved", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "saved")
    expected = ut.explain(net, x, target=1)
    a = ut.explain(loaded.serve, tf.constant(x), target=1)
    assert a.rewired == 2
    assert np.allclose(a.numpy(), expected.values, atol=1e-6)


def test_threads_do_not_interfere(x):
    nets = [small(seed) for seed in range(4)]
    expected = [ut.explain(net, x, target=1, rule=rule).values for net in nets for rule in ("guided", "deconvnet")]
    maps: dict[int, np.ndarray] = {}

    def work(index):
        for _ in range(3):
            tracing.cache.clear()
            rule = ("guided", "deconvnet")[index % 2]
            maps[index] = ut.explain(nets[index // 2], x, target=1, rule=rule).values

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(maps[index], expected[index]) for index in range(8))


# estimators


def test_estimators_average_what_keras_answers(net, x):
    plain = ut.explain(net, x, rule="guided")
    assert np.allclose(ut.explain(net, x, rule="guided", estimator="input-times").values, plain.values * x)
    path = ut.explain(net, x, rule="gradient", estimator="integrated:400", target=1)
    expected = np.asarray(net(x))[:, 1] - np.asarray(net(np.zeros_like(x)))[:, 1]
    assert path.values.dtype == x.dtype
    np.testing.assert_allclose(path.values.sum(1), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    smooth = ut.explain(net, tf.constant(x), rule="guided", estimator="smoothgrad:3", seed=2)
    draw, total = np.random.default_rng(2), 0.0
    for _ in range(3):
        noise = draw.standard_normal(x.shape) * 0.1 * (x.max(1, keepdims=True) - x.min(1, keepdims=True))
        total = total + ut.explain(net, x + noise.astype(np.float32), rule="guided", target=plain.targets).values
    assert tf.is_tensor(smooth.values)
    np.testing.assert_allclose(smooth.numpy(), total / 3, rtol=1e-5, atol=1e-6)


def two_heads():
    """A functional model with two named inputs and two heads."""
    image, size = keras.Input((6, 6, 2), name="image"), keras.Input((3,), name="size")
    h = keras.layers.Flatten()(keras.layers.Conv2D(3, 3, activation="relu")(image))
    h = keras.layers.Concatenate()([h, keras.layers.Dense(4)(size)])
    return keras.Model({"image": image, "size": size}, {"a": keras.layers.Dense(5)(h), "b": keras.layers.Dense(3)(h)})


@pytest.mark.parametrize("target", [2, lambda out: out["b"][:, 2]])
def test_named_inputs_and_heads(target):
    model, draw = two_heads(), np.random.default_rng(0)
    x = {"image": draw.normal(size=(2, 6, 6, 2)).astype("float32"), "size": draw.normal(size=(2, 3)).astype("float32")}
    tensors = {name: tf.constant(value) for name, value in x.items()}
    with tf.GradientTape() as tape:
        tape.watch(list(tensors.values()))
        score = tf.reduce_sum(model(tensors)["b"][:, 2])
    wanted = tape.gradient(score, tensors)
    a = ut.explain(model, x, rule="gradient", target=target, output=None if callable(target) else "b")
    assert list(a.values) == ["image", "size"]
    for name in x:
        np.testing.assert_allclose(a.values[name], wanted[name], atol=1e-6)
    listed = ut.explain(model, x, rule="gradient", target=target, output=None if callable(target) else ["b"])
    np.testing.assert_array_equal(listed.values["image"], a.values["image"])


def test_a_head_that_is_not_there_is_said():
    x = {"image": np.ones((1, 6, 6, 2), "float32"), "size": np.ones((1, 3), "float32")}
    with pytest.raises(ut.ModelError, match="no part 'c'"):
        ut.explain(two_heads(), x, rule="gradient", target=0, output="c")
    with pytest.raises(ut.ModelError, match="returned a dict"):
        ut.explain(two_heads(), x, rule="gradient", target=0)


# inputs of other libraries


@pytest.mark.parametrize("x", [np.ones((6, 6, 3), np.float32), tf.ones((6, 6, 3))])
def test_a_sample_without_a_batch_axis_is_recognised(x):
    conv = keras.Sequential([keras.Input((6, 6, 3)), layers.Conv2D(2, 3), layers.Flatten(), layers.Dense(2)])
    with pytest.raises(
        ut.InputError, match=r"x of shape \(6, 6, 3\) looks like one sample without a batch axis; pass x\["
    ):
        ut.explain(conv, x, rule="gradient")


def test_tensors_of_the_other_framework_are_told_how(net):
    import torch

    x = torch.ones(2, 4, requires_grad=True)
    with pytest.raises(
        ut.InputError, match=r"x is a PyTorch tensor, and the model is of Keras on TensorFlow; use x\.nu"
    ):
        ut.explain(net, x)
    assert ut.explain(net, x.numpy(force=True)).values.shape == (2, 4)  # as the message says
    module = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU()).eval()
    with pytest.raises(
        ut.InputError, match=r"TensorFlow tensor, and the model takes a torch tensor; use torch\.from_numpy\(x\.n"
    ):
        ut.explain(module, tf.ones((2, 4)))
    assert ut.explain(module, torch.from_numpy(tf.ones((2, 4)).numpy())).values.shape == (2, 4)


def test_an_array_of_another_library_is_told_how(net):
    class ArrayImpl:
        shape, dtype = (2, 4), np.dtype("float32")

    ArrayImpl.__module__ = "jaxlib._jax"
    with pytest.raises(ut.InputError, match=r"x is a JAX array, and the model is of Keras .*; use numpy\.array\(x\)"):
        ut.explain(net, ArrayImpl())


def test_a_rule_for_more_than_activations_is_refused(net, x):
    for rule in ("attnlrp", "lrp:epsilon-plus-flat", ut.Rule({"product": lambda g, local, op: local(g / 2)})):
        with pytest.raises(ut.RuleError, match="reaches, on PyTorch"):
            ut.explain(net, x, rule=rule)
    with pytest.raises(ut.RuleError, match="reaches, on PyTorch"):
        ut.explain(net, x, rule="deeplift", baseline=1.0)
