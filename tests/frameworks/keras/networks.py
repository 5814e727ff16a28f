"""The table of awkward Keras networks: every way to write an activation in Keras 3 or TensorFlow.

Each row builds a fresh network and its input, always the same ones. Scores are `(2, 4)` for every row, images are
channels last, inputs are asymmetric in every axis.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

CLASSES = 4
IMAGE, VECTOR, SERIES, VOLUME = (7, 9, 3), (6,), (11, 3), (6, 5, 4, 2)


@dataclass(frozen=True)
class Network:
    """One row.

    Attributes:
        name: unique, fit for a test id.
        build: returns the network and its input: an array, or a tuple of them to call it with.
        rewired: how many ReLU-like calls lie between the input and the scores.
        swap: every activation is a layer, or an `activation=` of one, of a model that Keras can clone.
        rewired_all: the count with `activations="all"`, where it is another.
        twin: the same network with the same numbers where an eager run cannot see its activations.
    """

    name: str
    build: Callable[[], tuple[Any, Any]]
    rewired: int
    swap: bool = False
    rewired_all: int | None = None
    twin: Callable[[], tuple[Any, Any]] | None = None

    def __str__(self) -> str:
        return self.name


def seeded(name: str, make: Callable[[], Any], *shapes: tuple[int, ...]) -> tuple[Any, Any]:
    """Build a network whose weights, and input, come from a seed of its own."""
    seed = zlib.crc32(name.encode())
    numbers = np.random.default_rng(seed)
    x = tuple((numbers.normal(size=(2, *shape)) * 1.3 + 0.2).astype(np.float32) for shape in shapes)
    model = make()
    if isinstance(model, keras.Layer):
        if not model.built:
            model(x[0] if len(x) == 1 else list(x))
        model.set_weights([_weight(numbers, value) for value in model.get_weights()])
    return model, x[0] if len(x) == 1 else x


def _weight(numbers: np.random.Generator, value: np.ndarray) -> np.ndarray:
    """Draw weights as of a trained network; a variance, and what has to be a whole number, stays as it is."""
    if value.dtype.kind in "iu" or (value.ndim == 1 and (value == 1).all()):
        return value
    return (numbers.normal(size=value.shape) * 0.8 / max(value.size / max(value.shape[-1:] or (1,)), 1) ** 0.5).astype(
        value.dtype
    )


def _row(
    name: str, make: Callable[[], Any], rewired: int, shape: Any = IMAGE, twin: Any = None, **options: Any
) -> Network:
    shapes = shape if isinstance(shape[0], tuple) else (shape,)
    return Network(
        name,
        lambda: seeded(name, make, *shapes),
        rewired,
        twin=None if twin is None else lambda: seeded(name, twin, *shapes),
        **options,
    )


def around(middle: Callable[[Any], Any]) -> keras.Model:
    """A functional model: a convolution, any function of its output, a convolution, then linear scores."""
    x = keras.Input(IMAGE)
    h = layers.Conv2D(5, 3)(middle(layers.Conv2D(5, 3, name="first")(x)))
    return keras.Model(x, layers.Dense(CLASSES)(layers.GlobalAveragePooling2D()(h)))


class Around(keras.Model):
    """The same, subclassed, so that anything may be written in `call`."""

    def __init__(self, middle: Callable[[Any], Any]):
        super().__init__()
        self.first, self.second = layers.Conv2D(5, 3), layers.Conv2D(5, 3)
        self.pool, self.head, self._middle = layers.GlobalAveragePooling2D(), layers.Dense(CLASSES), middle

    def call(self, x):
        return self.head(self.pool(self.second(self._middle(self.first(x)))))


def _string() -> keras.Model:
    stack = [
        layers.Conv2D(5, 3, activation="relu"),
        layers.Activation("relu"),
        layers.DepthwiseConv2D(2, activation="relu6"),
    ]
    stack += [layers.Flatten(), layers.Dense(7, activation="leaky_relu"), layers.Dense(CLASSES)]
    return keras.Sequential([keras.Input(IMAGE), *stack])


def _nested() -> keras.Model:
    inner = keras.Sequential([layers.Conv2D(5, 3, activation="relu"), layers.ReLU()])
    x = keras.Input(IMAGE)
    middle = keras.Model(x, inner(x), name="middle")
    return keras.Sequential([keras.Input(IMAGE), middle, layers.Flatten(), layers.Dense(CLASSES)])


def _subclass_within() -> keras.Model:
    class Block(layers.Layer):
        def __init__(self):
            super().__init__()
            self.conv = layers.Conv2D(5, 3)

        def call(self, x):
            return tf.nn.relu(self.conv(x)) * 1.1

    return keras.Sequential([keras.Input(IMAGE), Block(), layers.ReLU(), layers.Flatten(), layers.Dense(CLASSES)])


def _reused() -> keras.Model:
    relu, shared = layers.ReLU(), layers.Dense(6)
    x = keras.Input(VECTOR)
    return keras.Model(x, layers.Dense(CLASSES)(relu(shared(relu(shared(relu(shared(x))))))))


def _preactivation() -> keras.Model:
    def block(h):
        before = layers.BatchNormalization()(h)
        return before + layers.Conv2D(5, 3, padding="same")(layers.ReLU()(before))

    return around(block)


def _dropout() -> keras.Model:
    return around(lambda h: layers.Dropout(0.5)(layers.ReLU()(layers.BatchNormalization()(h))))


def _two_inputs() -> keras.Model:
    image, vector = keras.Input(IMAGE), keras.Input(VECTOR)
    h = layers.GlobalAveragePooling2D()(layers.Conv2D(5, 3, activation="relu")(image))
    return keras.Model([image, vector], layers.Dense(CLASSES)(h * layers.Dense(5, activation="relu")(vector)))


class Beside(keras.Model):
    """Scores that come wrapped; the second ReLU serves only what is returned beside them."""

    def __init__(self, wrap: Callable[[Any, Any], Any]):
        super().__init__()
        self.features, self.beside, self._wrap = around(ops.relu), layers.Dense(2, activation="relu"), wrap

    def call(self, x):
        return self._wrap(self.features(x), self.beside(layers.Flatten()(x)))


class Hypernetwork(keras.Model):
    """The first ReLU acts on weights alone and no gradient at the input goes through it; the second is a real one."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = layers.Dense(6), layers.Dense(CLASSES)
        self.seed = self.add_weight(shape=(6, 7), name="seed")

    def call(self, x):
        return self.head(tf.nn.relu(self.enter(x) @ (tf.nn.relu(self.seed) - 0.4)))


class Attention(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.attend, self.norm = layers.MultiHeadAttention(2, 4), layers.LayerNormalization()
        self.up, self.down, self.head = layers.Dense(12, activation="relu"), layers.Dense(3), layers.Dense(CLASSES)

    def call(self, x):
        h = self.norm(x + self.attend(x, x))
        return self.head((h + self.down(self.up(h)))[:, 0])


def _recurrent() -> keras.Model:
    stack = [layers.SimpleRNN(5, activation="relu", unroll=True), layers.Dense(CLASSES)]
    return keras.Sequential([keras.Input((3, 6)), *stack])


def _volume() -> keras.Model:
    stack = [layers.Conv3D(3, 2, activation="relu"), layers.MaxPooling3D(), layers.Flatten(), layers.Dense(CLASSES)]
    return keras.Sequential([keras.Input(VOLUME), *stack])


def _series() -> keras.Model:
    stack = [layers.Conv1D(5, 3, activation="relu"), layers.MaxPooling1D(), layers.Flatten(), layers.Dense(CLASSES)]
    return keras.Sequential([keras.Input(SERIES), *stack])


def _function() -> Any:
    numbers = np.random.default_rng(5)
    kernel, head = (numbers.normal(size=size).astype("float32") * 0.3 for size in ((3, 3, 3, 5), (5, CLASSES)))
    return lambda x: tf.reduce_mean(tf.nn.relu(tf.nn.conv2d(x, kernel, 1, "VALID")), (1, 2)) @ head


def _read_within(h: Any) -> Any:
    """What would be one activation with a cap if nobody else read the uncapped one."""
    return tf.clip_by_value(h, 0.0, 0.5) + h * 0.3


def _inner(decorate: Callable[[Any], Any]) -> Callable[[], keras.Model]:
    return lambda: Around(decorate(lambda h: tf.nn.relu(h) + tf.nn.leaky_relu(h - 0.3, 0.1)))


def _inner_twin() -> keras.Model:
    return _inner(lambda f: f)()


def relu(**options: float) -> Callable[[], keras.Model]:
    return lambda: around(layers.ReLU(**options))


AWKWARD: list[Network] = [
    _row("layer", lambda: around(layers.ReLU()), 1, swap=True),
    _row("string", _string, 4, swap=True),
    _row("nested", _nested, 2, swap=True),
    _row("reused", _reused, 3, VECTOR, swap=True),
    _row("preactivation", _preactivation, 1, swap=True),
    _row("batch_norm_dropout", _dropout, 1, swap=True),
    _row("series", _series, 1, SERIES, swap=True),
    _row("volume", _volume, 1, VOLUME, swap=True),
    _row("two_inputs", _two_inputs, 2, (IMAGE, VECTOR), swap=True),
    _row("recurrent", _recurrent, 3, (3, 6), swap=True),
    _row("relu6", relu(max_value=6), 1, swap=True),
    _row("max_value", relu(max_value=0.4), 1, swap=True),
    _row("negative_slope", relu(negative_slope=0.2), 1, swap=True),
    _row("threshold", relu(threshold=0.3), 1, swap=True),
    _row("slope_max6", relu(negative_slope=0.2, max_value=6), 1, swap=True),
    _row("slope_max", relu(negative_slope=0.2, max_value=0.4), 1, swap=True),
    _row("slope_threshold", relu(negative_slope=0.2, threshold=0.3), 1, swap=True),
    _row("max_threshold", relu(max_value=0.6, threshold=0.3), 1, swap=True),
    _row("slope_max_threshold", relu(negative_slope=0.2, max_value=0.6, threshold=0.3), 1, swap=True),
    _row("leaky", lambda: around(layers.LeakyReLU(0.2)), 1, swap=True),
    _row("prelu", lambda: around(layers.PReLU()), 1, swap=True),
    _row("prelu_shared", lambda: around(layers.PReLU(shared_axes=[1, 2])), 1, swap=True),
    _row("ops_relu", lambda: around(ops.relu), 1),
    _row("ops_relu6", lambda: around(ops.relu6), 1),
    _row("ops_leaky", lambda: around(lambda h: ops.leaky_relu(h, 0.3)), 1),
    _row("subclassed", lambda: Around(lambda h: tf.nn.relu(h)), 1),
    _row("subclassed_ops", lambda: Around(ops.relu), 1),
    _row("subclass_within", _subclass_within, 2),
    _row("tf_relu6", lambda: Around(lambda h: tf.nn.relu6(h)), 1),
    _row("maximum", lambda: Around(lambda h: tf.maximum(h, 0.0)), 1),
    _row("maximum_first", lambda: Around(lambda h: tf.maximum(0.0, h)), 1),
    _row("ops_maximum", lambda: around(lambda h: ops.maximum(h, 0)), 1),
    _row("clip", lambda: Around(lambda h: tf.clip_by_value(h, 0.0, 0.5)), 1),
    _row("ops_clip", lambda: around(lambda h: ops.clip(h, 0, 0.5)), 1),
    _row("where", lambda: Around(lambda h: tf.where(h > 0, h, 0.0)), 1, twin=lambda: Around(lambda h: tf.nn.relu(h))),
    _row("two_readers", lambda: Around(lambda h: tf.nn.relu(h) * 1.3 - h * 0.4), 1),
    _row("read_within", lambda: Around(lambda h: _read_within(tf.nn.relu(h))), 2),
    _row("scaled", lambda: Around(lambda h: 1.7 * tf.nn.relu(h) + 0.3), 1),
    _row("twice", lambda: Around(lambda h: tf.nn.relu(tf.nn.relu(h) - 0.2)), 2),
    _row("both_signs", lambda: Around(lambda h: tf.nn.relu(h) * 0.4 + tf.nn.relu(-h)), 2),
    _row("hard_kinds", lambda: around(lambda h: layers.ReLU()(ops.hard_silu(h) + ops.hard_sigmoid(h))), 1, swap=True),
    _row("clip_by_epsilon", lambda: Around(lambda h: tf.nn.relu(tf.clip_by_value(h, -0.3, 0.5))), 1),
    _row("hypernetwork", Hypernetwork, 1, VECTOR),
    _row("tuple_output", lambda: Beside(lambda *both: both), 1),
    _row("dict_output", lambda: Beside(lambda y, z: {"beside": z, "logits": y}), 1),
    _row("attention", Attention, 1, SERIES),
    _row("function", _function, 1),
    _row("no_relu", lambda: around(ops.tanh), 0),
    # A function traced on its own has a graph of its own
    _row("tf_function", lambda: tf.function(_function()), 1, twin=_function),
    _row("inner_function", _inner(tf.function), 2, twin=_inner_twin),
    _row("inner_xla", _inner(tf.function(jit_compile=True)), 2, twin=_inner_twin),
    _row("inner_twice", _inner(lambda f: tf.function(tf.function(f))), 2, twin=_inner_twin),
]

SMOOTH: list[Network] = [
    _row(name, lambda name=name: around(layers.Activation(name)), 0, swap=True, rewired_all=1)
    for name in ("elu", "selu", "celu", "softplus", "silu", "gelu", "mish", "hard_silu")
]
SMOOTH += [
    _row("elu_alpha", lambda: around(layers.ELU(0.5)), 0, swap=True, rewired_all=1),
    _row("gelu_tanh", lambda: around(lambda h: ops.gelu(h, approximate=True)), 0, rewired_all=1),
    _row("tf_silu", lambda: Around(lambda h: tf.nn.silu(h, beta=1.5)), 0, rewired_all=1),
    _row("beside_relu", lambda: around(lambda h: layers.ReLU()(ops.gelu(h))), 1, rewired_all=2),
]
