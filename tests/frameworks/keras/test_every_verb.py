"""Networks written in every way: each verb right, or refused by name."""

import json
from itertools import pairwise

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import undertow as ut
from frameworks.keras.references import ruled


class Written(keras.Model):
    """Functions of Keras and TensorFlow, a Lambda, a layer that runs twice, and a dict as output."""

    def __init__(self):
        super().__init__()
        self.c, self.twice = layers.Conv2D(4, 3, name="c"), layers.Conv2D(4, 3, padding="same", name="twice")
        self.lam = layers.Lambda(lambda v: keras.ops.relu(v) * 2.0, name="lam")
        self.head = layers.Dense(3, name="head")

    def call(self, v):
        v = self.twice(self.lam(self.twice(keras.activations.relu(self.c(v)))))
        return {"scores": self.head(keras.ops.mean(tf.nn.relu(v), (1, 2))), "features": v}


def mixed():
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        stack = [layers.Conv2D(4, 3, activation="relu", name="c"), layers.BatchNormalization(name="n")]
        stack += [layers.ReLU(6.0, name="g"), layers.GlobalAveragePooling2D(name="m")]
        return keras.Sequential([keras.Input((8, 8, 3)), *stack, layers.Dense(3, dtype="float32", name="head")])
    finally:
        keras.config.set_dtype_policy(policy)


def channels_first():
    first = {"data_format": "channels_first"}
    stack = [layers.Conv2D(4, 3, activation="relu", name="c", **first), layers.MaxPooling2D(name="p", **first)]
    stack += [layers.BatchNormalization(axis=1, name="n"), layers.ReLU(name="g"), layers.Flatten(name="f")]
    return keras.Sequential([keras.Input((3, 8, 8)), *stack, layers.Dense(3, name="head")])


def nested():
    given = keras.Input((8, 8, 3))
    gate = layers.ReLU(max_value=2.0, negative_slope=0.1, name="g")
    inner = keras.Model(given, gate(layers.SeparableConv2D(4, 3, name="s")(given)), name="inner")
    deep = keras.Sequential([keras.Input((8, 8, 3)), inner, layers.PReLU(name="p")], name="deep")
    outer = keras.Input((8, 8, 3))
    h = layers.GlobalMaxPooling2D(name="m")(layers.Conv2DTranspose(3, 3, activation="relu6", name="t")(deep(outer)))
    return keras.Model(outer, layers.Dense(3, activation="softmax", name="head")(h))


def two_inputs():
    image, row = keras.Input((8, 8, 3), name="image"), keras.Input((5,), name="row")
    h = layers.GlobalAveragePooling2D(name="m")(layers.Conv2D(4, 3, activation="relu", name="c")(image))
    k = layers.Concatenate(name="k")([h, layers.Dense(4, activation="relu", name="d")(row)])
    return keras.Model([image, row], [layers.Dense(3, name="head")(k), layers.Dense(2, name="other")(h)])


NETWORKS = {"written": (Written, 3), "mixed": (mixed, 2), "first": (channels_first, 2), "nested": (nested, 3)}
NETWORKS |= {"two": (two_inputs, 2)}


def scores(output):
    part = output["scores"] if isinstance(output, dict) else output[0] if isinstance(output, list | tuple) else output
    return tf.cast(part, tf.float32)[:, 1]


def call(net, x):
    return net(list(x) if isinstance(x, tuple) else x, training=False)


@pytest.fixture(scope="module", params=NETWORKS)
def case(request):
    keras.utils.set_random_seed(1)
    build, calls = NETWORKS[request.param]
    net, numbers = build(), np.random.default_rng(0)
    x = numbers.normal(size=(2, 3, 8, 8) if request.param == "first" else (2, 8, 8, 3)).astype("float32")
    x = (x, numbers.normal(size=(2, 5)).astype("float32")) if request.param == "two" else x
    call(net, x)
    return net, x, calls


def parts(values):
    return [np.asarray(v, np.float64) for v in (values if isinstance(values, tuple) else (values,))]


def test_maps_and_counts_equal_the_twins(case):
    net, x, calls = case
    output = "scores" if isinstance(net, Written) else None
    a = ut.explain(net, x, rule="guided", target=1, head="as is", output=output)
    maps, count = ruled(lambda given: net(list(given) if isinstance(given, tuple) else given), x, scores, "guided")
    assert a.rewired == count == calls
    for ours, twin in zip(parts(a.values), maps, strict=True):
        assert np.abs(ours - twin).max() <= 1e-5 * np.abs(twin).max()


def test_blocks_add_up_to_a_tapes_gradient(case):
    net, x, _ = case
    blocks = ut.derive.from_model(net, x, target=scores)
    sources = [tf.constant(part) for part in (x if isinstance(x, tuple) else (x,))]
    with tf.GradientTape() as tape:
        tape.watch(sources)
        score = tf.reduce_sum(scores(call(net, tuple(sources) if len(sources) > 1 else sources[0])))
    norms = {block.name: block.gradient for block in blocks.blocks}
    for i, g in enumerate(tape.gradient(score, sources)):
        name = "x" if len(sources) == 1 else f"x[{i}]"
        assert norms[name] == pytest.approx(float(tf.norm(tf.cast(g, tf.float32))), rel=1e-3)
        assert blocks.check(blocks.derivative(name), 0) <= 1e-2 if net.compute_dtype == "float16" else 1e-5


@pytest.mark.filterwarnings("ignore:. of . sites were not recorded")
@pytest.mark.filterwarnings("ignore:float16 gradients came out of autocast")
def test_what_is_diagnosed_was_seen_exactly(case, tmp_path):
    """The zeros before each activation and max-pooling are those that their forward pass predicts."""
    net, x, _ = case
    with ut.record(tmp_path / "a", net, sites="**", measures="zero-fraction", diagnose=1) as r, r.batch():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(scores(call(net, x)) ** 2)
        tape.gradient(loss, net.trainable_variables)
    rows = ut.Run(tmp_path / "a").table("diagnosis").to_pylist()
    chains = {}
    for row in rows:
        chains.setdefault((row["site"], row["call"], row["output"]), []).append(row)
    followed = 0
    for chain in chains.values():
        chain.sort(key=lambda row: row["step"])
        for before, step in pairwise(chain):
            alone = len(json.loads(before["readers"])) == 1
            if step["expected_zeros"] >= 0 and alone:
                followed += 1
                assert step["expected_zeros"] == before["zeros"]
    assert followed >= 2
    assert "unread" not in {row["arrival"] for row in rows if row["site"] not in ("other",)}
