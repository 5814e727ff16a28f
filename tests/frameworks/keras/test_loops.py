"""Loops: in the graph of an explanation they are refused by name, run eagerly each turn is an ordinary call."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import undertow as ut

KINDS = {
    "lstm": lambda: layers.LSTM(4, name="rnn"),
    "gru": lambda: layers.GRU(4, name="rnn"),
    "simple": lambda: layers.SimpleRNN(4, activation="relu", name="rnn"),
    "bidirectional": lambda: layers.Bidirectional(layers.LSTM(2), name="rnn"),
}


def network(kind="lstm"):
    keras.utils.set_random_seed(1)
    first, head = layers.Dense(5, activation="relu", name="first"), layers.Dense(3, name="head")
    return keras.Sequential([keras.Input((6, 3)), first, KINDS[kind](), head])


class Loop(keras.Model):
    """A loop of TensorFlow's own around a layer."""

    def __init__(self, kind):
        super().__init__()
        self.inner, self.head, self.kind = layers.Dense(3, name="inner"), layers.Dense(3, name="head"), kind

    def call(self, v):
        step = lambda u: tf.nn.relu(self.inner(u))  # noqa: E731
        if self.kind == "while":
            v = tf.while_loop(lambda i, _: i < 3, lambda i, u: (i + 1, step(u)), [tf.constant(0), v])[1]
        elif self.kind == "map":
            v = tf.map_fn(step, v)
        else:
            turns = tf.transpose(v, [1, 0, 2])
            v = tf.scan(lambda a, u: step(u) + a, turns, initializer=tf.zeros((2, 3)))[-1][:, None]
        return self.head(tf.reduce_mean(v, 1))


def loop(kind):
    keras.utils.set_random_seed(2)
    net = Loop(kind)
    net(inputs())
    return net


NETWORKS = {
    **dict.fromkeys(KINDS, (network, "rnn")),
    **dict.fromkeys(("while", "map", "scan"), (loop, "inner")),
}


def inputs():
    return np.random.default_rng(0).normal(size=(2, 6, 3)).astype("float32")


def loss_and_gradient(net, x):
    with tf.GradientTape() as tape:
        source = tf.constant(x)
        tape.watch(source)
        loss = tf.reduce_sum(net(source, training=False)[:, 1])
    return tape.gradient(loss, source).numpy()


@pytest.fixture(scope="module", params=NETWORKS)
def looped(request):
    build, layer = NETWORKS[request.param]
    return build(request.param), layer, request.param


def test_the_plain_gradient_is_right_and_rules_are_refused_by_name(looped):
    net, _, _ = looped
    x = inputs()
    expected = loss_and_gradient(net, x)
    a = ut.explain(net, x, rule="gradient", target=1)
    assert np.abs(a.values - expected).max() <= 1e-5 * np.abs(expected).max()
    for rule in ("guided", "deconvnet"):
        with pytest.raises(ut.RuleError, match=r"cannot see into While: a loop or a branch .* unroll=True"):
            ut.explain(net, x, rule=rule, target=1)


def test_redirections_reach_into_loops(looped):
    net, layer, kind = looped
    x = inputs()
    plain = loss_and_gradient(net, x)
    with ut.redirect(net, {layer: ut.redirect.scale(2.0)}) as redirected:
        changed = loss_and_gradient(net, x)
    calls = {"while": 3, "map": 2, "scan": 6}.get(kind, 1)
    assert redirected.changed == {layer: calls}
    if kind != "scan":  # whose turns add up
        assert np.allclose(changed, plain * (8 if kind == "while" else 2), rtol=1e-4, atol=1e-7)


def test_traces_and_blocks_reach_into_loops(looped):
    net, layer, kind = looped
    x = inputs()
    blocks = ut.derive.from_model(net, x)
    assert blocks.check(blocks.derivative("x"), 0) < 1e-5
    traced = ut.trace(net, x)
    assert {call.verdict for call in traced if call.name in ("first", "inner", "head")} == {"equal"}
    if kind in ("while", "map", "scan"):
        calls = [call.call for call in traced if call.name == layer]
        assert calls == list(range({"while": 3, "map": 2, "scan": 6}[kind]))
        assert {f"inner#{i}" for i in calls} < set(blocks.order)


def test_what_is_within_a_loop_is_refused_in_graphs_by_name():
    cell, net, x = "rnn.lstm_cell", network(), inputs()
    out_of_sight = pytest.raises(ut.InputError, match=r"'rnn.lstm_cell' runs in a tf.function or a loop of its own")
    for options in ({"at": cell}, {"target": ut.targets.unit(cell, 1)}, {"estimator": f"grad-cam:{cell}"}):
        with out_of_sight:
            ut.explain(net, x, rule="gradient", **options)
    assert ut.explain(net, x, rule="gradient", at="rnn").values.shape == (2, 4)


def test_each_turn_is_recorded_and_diagnosed(tmp_path):
    net, x = network("simple"), np.random.default_rng(0).normal(size=(64, 6, 3)).astype("float32")
    cell = net.get_layer("rnn").cell
    cell.bias.assign(np.array([0.0, -100.0, 0.0, 0.0]))
    measures = ["keep", "norm"]
    with ut.record(tmp_path / "a", net, sites="rnn.*", measures=measures, diagnose=1) as recording, recording.batch():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(net(x) ** 2)
        tape.gradient(loss, net.trainable_variables)
    kept = {row["call"]: values for row, values in ut.Run(tmp_path / "a").tensors()}
    assert sorted(kept) == [1, 2, 3, 4, 5, 6]  # Keras calls the cell once more, before the loop
    with tf.GradientTape() as tape:  # by hand
        state, turns, h = tf.zeros((64, 4)), [], net.get_layer("first")(x)
        for t in range(6):
            state = tf.nn.relu(h[:, t] @ cell.kernel + state @ cell.recurrent_kernel + cell.bias)
            tape.watch(state)
            turns.append(state)
        loss = tf.reduce_sum(net.get_layer("head")(state) ** 2)
    for number, g in enumerate(tape.gradient(loss, turns), 1):
        assert np.allclose(kept[number], g, rtol=1e-4, atol=1e-5)
    found = {finding.cause: finding for finding in ut.diagnose(tmp_path / "a")}
    assert "arrival" not in {name for name, answer in ut.diagnose(tmp_path / "a").checked.items() if "but" in answer}
    assert "unreached" not in found


def test_a_verdict_says_what_it_could_not_ask():
    convolution = layers.Conv2D(4, 3, padding="same", activation="relu", name="c")
    stack = [keras.Input((6, 6, 3)), convolution, layers.Reshape((6, 24)), layers.LSTM(4, name="rnn"), layers.Dense(3)]
    net, x = keras.Sequential(stack), np.random.default_rng(0).normal(size=(1, 6, 6, 3)).astype("float32")
    verdict = ut.trust(net, x, rule="gradient")
    assert "runs in a tf.function or a loop of its own" in verdict.unanswered["convergence"]
    with pytest.raises(ut.RuleError, match="cannot see into While"):
        ut.trust(net, x, rule="guided")
