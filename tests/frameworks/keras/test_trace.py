"""One pass of a Keras network on TensorFlow: traced call by call, and redirected."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import undertow as ut
from undertow.frameworks import keras_formulas


@pytest.fixture(scope="module")
def net():
    keras.utils.set_random_seed(7)
    inner = [keras.Input((10, 14, 4)), layers.Conv2D(6, 3, strides=2, padding="same", groups=2, name="conv")]
    inner = keras.Sequential([*inner, layers.BatchNormalization(name="norm")], name="inner")
    shared = layers.Conv2D(6, 3, padding="same", activation="tanh", name="shared")
    x = keras.Input((12, 16, 3))
    h = shared(shared(inner(layers.Conv2D(4, 3, activation="relu", name="first")(x))))
    h = layers.AveragePooling2D(2, padding="same", name="average")(layers.ReLU(6.0, 0.1, name="gate")(h))
    h = layers.MaxPooling2D(2, strides=1, name="largest")(h)
    h = layers.Dense(7, activation="relu", name="hidden")(layers.Flatten(name="flat")(h))
    net = keras.Model(x, layers.Dense(5, activation="softmax", name="head")(h))
    numbers = np.random.default_rng(3)
    norm = inner.get_layer("norm")
    norm.set_weights([numbers.uniform(0.5, 1.5, size=6).astype("float32") for _ in norm.weights])
    return net


@pytest.fixture
def x():
    return np.random.default_rng(5).normal(size=(2, 12, 16, 3)).astype(np.float32)


def test_each_call_and_its_closed_formulas(net, x):
    traced = ut.trace(net, x)
    names = ["first", "inner.conv", "inner.norm", "shared", "shared"]
    names += ["gate", "average", "largest", "flat", "hidden", "head"]
    assert [call.name for call in traced] == names
    assert [row.formula for row in traced.table()] == ["equal"] * len(names)
    assert traced["shared", 1].formula.keys() == {"input", "kernel", "bias"}
    assert traced.unreached == ()
    assert "gamma" in str(traced)


def test_gradients_equal_those_of_a_tape(net, x):
    traced = ut.trace(net, x, gradient=np.eye(5, dtype="float32")[[1, 3]])
    with tf.GradientTape() as tape:
        score = tf.reduce_sum(net(x) * np.eye(5)[[1, 3]])
    kernels = [net.get_layer("shared").kernel.value, net.get_layer("inner").get_layer("conv").kernel.value]
    both, conv = tape.gradient(score, kernels)
    calls = [traced["shared", i].parameter_gradients["kernel"] for i in range(2)]
    assert np.abs(calls[0]).max() > 0  # each by way of its own call; together they are the weight's gradient
    assert np.allclose(calls[0] + calls[1], both, atol=1e-7)
    assert np.allclose(traced["inner.conv"].parameter_gradients["kernel"], conv, atol=1e-7)
    assert traced["inner.norm"].parameter_gradients["moving_mean"] is None
    gradient = ut.explain(net, x, rule="gradient", target=[1, 3], head="as is").values
    assert np.allclose(traced["first"].input_gradients[0], gradient, atol=1e-7)


FORMULAS = [
    (layers.Dense(5, activation="sigmoid"), (2, 4)),
    (layers.Dense(5), (2, 3, 4)),
    (layers.Conv2D(4, (3, 2), strides=(2, 1), activation="relu6"), (2, 7, 6, 2)),
    (layers.Conv2D(4, 3, dilation_rate=2, padding="same", use_bias=False), (2, 7, 6, 2)),
    (layers.Activation("softmax"), (2, 5)),
    (layers.Softmax(), (2, 5)),
    (layers.ReLU(0.4, 0.2, 0.1), (2, 5)),
    (layers.MaxPooling2D(3, 2, padding="same"), (2, 7, 6, 2)),
    (layers.AveragePooling2D(3, 2, padding="same"), (2, 7, 6, 2)),
    (layers.GlobalAveragePooling2D(), (2, 7, 6, 2)),
    (layers.BatchNormalization(scale=False), (2, 7, 6, 2)),
]


@pytest.mark.parametrize(("layer", "shape"), FORMULAS, ids=lambda value: getattr(value, "name", None))
def test_formulas_equal_a_tape_and_tell_a_wrong_gradient(layer, shape):
    numbers = np.random.default_rng(2)
    x = tf.constant(numbers.normal(size=shape), tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x)
        g = tf.constant(numbers.normal(size=y.shape), tf.float32)
    variables = list(layer.trainable_variables)
    found = tape.gradient(y, [x, *[v.value for v in variables]], output_gradients=g)
    gradients = dict(zip(["input", *(v.name for v in variables)], [value.numpy() for value in found], strict=True))
    for name in gradients:
        for wrong in (False, True):
            given = gradients | ({name: -gradients[name]} if wrong else {})
            told = keras_formulas.formula_differences(layer, x.numpy(), y.numpy(), g.numpy(), given, "float32")
            assert told[name].equal is not wrong, (name, told[name])


def test_a_class_of_ones_own_has_no_formula(x):
    class Mine(layers.Dense):
        pass

    net = keras.Sequential([keras.Input((6,)), Mine(3, name="mine"), layers.Dropout(0.5, name="drop")])
    traced = ut.trace(net, np.ones((2, 6), "float32"))
    assert [row.formula for row in traced.table()] == ["none", "none"]
    assert float(traced["drop"].input_gradients[0][0, 0]) == 1  # out of training


def test_what_cannot_be_traced_is_said(net, x):
    dense = layers.Dense(3, name="dense")
    inner = tf.function(lambda v: dense(v))
    inner(dense(np.ones((1, 4), "float32"))[:, :1] * tf.ones((1, 4)))

    class Around(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense, self.other = dense, layers.Dense(2, name="other")

        def call(self, v):
            return self.other(inner(v))

    model = Around()
    model(np.ones((1, 4), "float32"))
    with pytest.raises(ut.InputError, match=r"layer 'dense' runs in a tf\.function, out of sight"):
        ut.trace(model, np.ones((1, 4), "float32"))
    with pytest.raises(ut.InputError, match=r"gradient has shape \(2, 4\) where the output has \(2, 5\)"):
        ut.trace(net, x, gradient=np.ones((2, 4)))
    with pytest.raises(ut.InputError, match=r"trace looks at the calls of a keras\.Model's layers"):
        ut.trace(lambda v: v, tf.constant(x))


# redirect


def gradient_of(net, x):
    with tf.GradientTape() as tape:
        source = tf.constant(x)
        tape.watch(source)
        score = tf.reduce_sum(net(source)[:, 2])
    return tape.gradient(score, source).numpy()


def test_what_a_function_returns_flows_on(net, x):
    plain = gradient_of(net, x)
    with ut.redirect(net, {"inner": ut.redirect.scale(-3.0)}) as redirected:
        assert np.allclose(gradient_of(net, x), -3 * plain, atol=1e-6)
    assert redirected.changed == {"inner": 1}
    with ut.redirect(net, {"shared": ut.redirect.scale(2.0)}) as redirected:
        assert np.allclose(gradient_of(net, x), 4 * plain, atol=1e-6)  # it runs twice
    assert redirected.changed == {"shared": 2}
    assert np.array_equal(gradient_of(net, x), plain)


def test_zero_clip_and_noise(net, x):
    plain = gradient_of(net, x)
    with ut.redirect(net, {"first": ut.redirect.zero()}):
        assert not gradient_of(net, x).any()
    arrived = []
    keep = lambda g: arrived.append(g) or g  # noqa: E731
    with ut.redirect(net, {"in*": ut.redirect.clip(1e-3), "first": keep}):
        gradient_of(net, x)
    with ut.redirect(net, {"inner": keep}):
        gradient_of(net, x)
    assert np.linalg.norm(arrived[-1][0]) > 1e-3
    with ut.redirect(net, {"inner": ut.redirect.noise(0.1, seed=4)}):
        noisy = gradient_of(net, x)
    with ut.redirect(net, {"inner": ut.redirect.noise(0.1, seed=4)}):
        assert np.array_equal(gradient_of(net, x), noisy)
    assert not np.allclose(noisy, plain)
    g = tf.constant([[3.0, 4.0], [0.0, 0.0]])
    assert np.allclose(ut.redirect.clip(1.0)(g), [[0.6, 0.8], [0, 0]])


def test_what_cannot_be_redirected_is_said(net, x):
    with pytest.raises(ut.InputError, match="no layer matches 'innre'; did you mean inner"):
        ut.redirect(net, {"innre": ut.redirect.zero()})
    with (
        pytest.raises(ut.RuleError, match="no gradient came back through 'inner'"),
        ut.redirect(net, {"inner": ut.redirect.zero()}),
    ):
        net(x)
    traced = tf.function(lambda v: net(v))
    with (
        pytest.raises(ut.RuleError, match=r"layer 'inner' ran in a traced graph"),
        ut.redirect(net, {"inner": ut.redirect.zero()}),
    ):
        traced(tf.constant(x))
    with (
        pytest.raises(ut.InputError, match=r"the function for 'inner' returned a float"),
        ut.redirect(net, {"inner": lambda g: 1.0}),
    ):
        gradient_of(net, x)


def test_mixed_precision_and_a_batch_norm_in_training(x):
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        stack = [layers.Conv2D(4, 3, activation="relu", name="c"), layers.GlobalAveragePooling2D(name="m")]
        mixed = keras.Sequential([keras.Input((12, 16, 3)), *stack, layers.Dense(3, dtype="float32", name="h")])
    finally:
        keras.config.set_dtype_policy(policy)
    traced = ut.trace(mixed, x)
    assert [(call.name, call.verdict) for call in traced] == [("c", "equal"), ("m", "equal"), ("h", "equal")]
    assert traced["c"].parameter_gradients["kernel"].dtype == "float32"

    class Acting(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm, self.head = layers.BatchNormalization(name="n"), layers.Dense(3, name="h")

        def call(self, v):
            return self.head(tf.reduce_mean(self.norm(v, training=True), (1, 2)))

    acting = Acting()
    acting(x)
    norm = ut.trace(acting, x)["n"]
    assert norm.verdict == "none"  # the closed formula is of one out of training
    assert norm.input_gradients[0] is not None
