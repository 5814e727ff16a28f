"""Keras on JAX, in a process of its own, since a process has one backend: `python keras_on_jax.py`.

Each model is compared with its layers' formulas written in JAX, activations swapped by hand.
"""

import os
import sys
import tempfile

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import relevance_twins
import twins

import undertow as ut
from undertow.frameworks.base import framework_of
from undertow.frameworks.jax.record import objective

X = np.random.default_rng(3).normal(size=(2, 12, 12, 3)).astype(np.float32)


def convolved(x, layer):
    kernel, bias = (variable.value for variable in layer.weights)
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) + bias


def close(values, wanted):
    assert np.abs(np.asarray(values) - np.asarray(wanted)).max() <= 1e-5 * np.abs(np.asarray(wanted)).max()


def functional():
    x = keras.Input((12, 12, 3))
    h = keras.layers.Conv2D(6, 3, padding="same", name="conv")(x)
    h = keras.layers.Dropout(0.5)(keras.layers.BatchNormalization(name="norm")(h))
    h = keras.layers.GlobalAveragePooling2D()(keras.layers.ReLU()(h))
    return keras.Model(x, keras.layers.Dense(4, activation="softmax", name="dense")(h))


model = functional()
assert framework_of(model) == "jax"
model.get_layer("norm").set_weights([np.linspace(0.5, 1, 6), np.linspace(-1, 1, 6), np.ones(6) / 3, np.ones(6) * 2])


def by_hand(activation, x):
    scale, shift, mean, variance = (variable.value for variable in model.get_layer("norm").weights)
    h = (convolved(x, model.get_layer("conv")) - mean) / jnp.sqrt(variance + 1e-3) * scale + shift
    kernel, bias = (variable.value for variable in model.get_layer("dense").weights)
    return activation(h).mean((1, 2)) @ kernel + bias


for rule in twins.RULES:
    a = ut.explain(model, X, rule=rule, target=1)
    close(a.values, jax.grad(lambda x, r=rule: by_hand(twins.swap(jax.nn.relu, twins.above, r), x)[:, 1].sum())(X))
    assert (a.head, a.channels_last, a.rewired) == ("before softmax", True, int(rule != "gradient"))
    assert isinstance(a.values, np.ndarray)
assert isinstance(ut.explain(model, jnp.asarray(X), target=1).values, jax.Array)

composite = ut.explain(model, X, rule="lrp:epsilon-gamma-box", target=1)
wanted = ut.explain(lambda x: by_hand(jax.nn.relu, x), jnp.asarray(X), rule="lrp:epsilon-gamma-box", target=1)
close(composite.values, wanted.values)
assert composite.rewired == wanted.rewired == 3

first = ut.explain(model, X, target=1).values
dense = model.get_layer("dense")
dense.set_weights([-weight for weight in dense.get_weights()])
assert not np.allclose(ut.explain(model, X, target=1).values, first)
assert ut.explain(model, X, target=1, training=True).acting == {"random numbers": 1, "batch norm in training": 1}
cam = ut.explain(model, X, estimator="grad-cam:norm", target=1)
assert cam.values.shape == (2, 12, 12, 1)
verdict = ut.trust(model, np.tile(X[:1], (1, 2, 2, 1)), rule="gradient", target=1)
assert set(verdict.answers) == {"class", "weights", "input", "faithfulness", "stability", "convergence"}

for options in ({}, {"negative_slope": 0.1}, {"max_value": 2.0}, {"max_value": 6.0}, {"threshold": 0.4},
                {"negative_slope": 0.1, "max_value": 2.0, "threshold": 0.4}):  # fmt: skip
    x = keras.Input((5,))
    net = keras.Model(x, keras.layers.Dense(3)(keras.layers.ReLU(**options)(keras.layers.Dense(7)(x))))
    a = ut.explain(net, X[:, 0, :5, 0], target=1)
    assert (a.rewired, a.skipped) == (1, {}), options
x = keras.Input((5,))
net = keras.Model(x, keras.layers.Dense(3)(keras.layers.PReLU(alpha_initializer="uniform")(keras.layers.Dense(7)(x))))
assert ut.explain(net, X[:, 0, :5, 0], target=1).rewired == 1

x = keras.Input((6, 8))
attention = keras.layers.MultiHeadAttention(2, 4, flash_attention=False)
norm, up, down = keras.layers.LayerNormalization(epsilon=1e-5), keras.layers.Dense(8, "gelu"), keras.layers.Dense(3)
h = x + attention(norm(x), norm(x))
transformer = keras.Model(x, down(keras.layers.GlobalAveragePooling1D()(h + up(h))))


def transformer_by_hand(kit, x):
    (wq, bq, wk, bk, wv, bv, wo, bo), (w, b) = (
        [variable.value for variable in layer.weights] for layer in (attention, up)
    )
    n = kit.layer_norm(x)
    q, k, v = (jnp.einsum("btd,dhe->bhte", n, w) + b[:, None] for w, b in ((wq, bq), (wk, bk), (wv, bv)))
    mixed = kit.mixed(kit.softmax(kit.matmul(q / 2, k.swapaxes(2, 3))), v)
    h = x + jnp.einsum("bhte,hed->btd", mixed, wo) + bo
    h = h + kit.activation(lambda z: jax.nn.gelu(z, approximate=False), h @ w + b)
    return h.mean(1) @ down.weights[0].value + down.weights[1].value


tokens = X[:, :6].reshape(2, 6, -1)[:, :, :8]
for rule in ("attnlrp", "cp-lrp"):
    a = ut.explain(transformer, tokens, rule=rule, target=1)
    close(a.values, relevance_twins.relevance(transformer_by_hand, relevance_twins.Twin(rule == "cp-lrp"), tokens, 1))
    assert (a.skipped, a.opaque) == ({}, {}), (a.skipped, a.opaque)

left, right = keras.Input((5,), name="left"), keras.Input((5,), name="right")
both = keras.Model([left, right], keras.layers.Dense(3)(keras.layers.Concatenate()([left, right])))
a = ut.explain(both, (X[:, 0, :5, 0], X[:, 1, :5, 0]), target=1, rule="gradient")
close(a.values[1], np.broadcast_to(both.layers[-1].get_weights()[0][5:, 1], (2, 5)))
named = ut.explain(both, {"left": X[:, 0, :5, 0], "right": X[:, 1, :5, 0]}, target=1, rule="gradient")
close(named.values["right"], a.values[1])

# calls traced, with closed formulas; gradients redirected; a training recorded
traced = ut.trace(model, X)
assert [call.name for call in traced.calls] == [layer.name for layer in model.layers[1:]]
assert {call.name: call.verdict for call in traced.calls} == {
    **dict.fromkeys((layer.name for layer in model.layers[1:]), "equal"),
    model.layers[3].name: "none",  # dropout
}
assert set(traced["norm"].parameter_gradients) == {"gamma", "beta", "moving_mean", "moving_variance"}
assert traced["norm"].parameter_gradients["moving_mean"] is None
close(traced["conv"].inputs[0], X)

weights = [v.value for v in model.trainable_variables], [v.value for v in model.non_trainable_variables]


def loss(trainable, others, x):
    scores, _ = model.stateless_call(trainable, others, x)
    return -jnp.log(scores[:, 1]).sum()


by_weights = jax.jit(jax.grad(loss))
plain = by_weights(*weights, X)
with ut.redirect(model, {"norm": ut.redirect.scale(3)}):
    close(by_weights(*weights, X)[0], 3 * plain[0])
assert np.array_equal(by_weights(*weights, X)[0], plain[0])
assert "call" not in vars(model.get_layer("norm"))

with tempfile.TemporaryDirectory() as folder:
    with ut.record(folder, model, sites="conv, dense, params:conv", measures="channel-norm") as recording:
        step = jax.jit(recording.value_and_grad(loss))
        with recording.batch(samples=["a", "b"]):
            value, gradients, seen = step(*weights, X)
            recording.add(seen)
    close(gradients[0], plain[0])
    rows = ut.Run(folder).table("channel_norm").to_pylist()
    assert ut.Run(folder).sites == ["conv", "dense"]
(row,) = (row for row in rows if row["site"] == "conv.kernel")
close(row["values"], np.linalg.norm(np.asarray(plain[0]).reshape(3, -1), axis=1))
(row,) = (row for row in rows if (row["site"], row["name"]) == ("conv", "b"))


def behind(h):
    scale, shift, mean, variance = (variable.value for variable in model.get_layer("norm").weights)
    h = jax.nn.relu((h - mean) / jnp.sqrt(variance + 1e-3) * scale + shift).mean((1, 2))
    kernel, bias = (variable.value for variable in model.get_layer("dense").weights)
    return -jnp.log(jax.nn.softmax(h @ kernel + bias)[:, 1]).sum()


# the layer that ends in the softmax gives, as a site, what is explained
with tempfile.TemporaryDirectory() as folder:
    with (
        objective(model, "predicted") as run,
        ut.record(folder, model, sites="dense") as recording,
        recording.batch(),
    ):
        ids, _ = run(X, None)
    found = ut.Run(folder).table("channel_norm").to_pylist()
    assert np.array_equal([row["values"] for row in found], np.eye(4)[ids])

by = np.asarray(jax.grad(behind)(convolved(X, model.get_layer("conv"))))
close(row["values"], np.linalg.norm(by[1].reshape(-1, 6), axis=0))

with pytest.raises(
    ut.FrameworkError, match=r"not supported; set KERAS_BACKEND=.* ut.redirect and ut.record take the model"
):
    ut.load("keras:MobileNetV2@none")
assert "torch" not in sys.modules
