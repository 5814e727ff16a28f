"""Recording Keras networks: what is read equals what a tape says, and nothing stays behind."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import undertow as ut
from undertow.frameworks.base import capability
from undertow.frameworks.keras.internals import all_layers
from undertow.measures import Keep


def backbone() -> keras.Model:
    """A functional model with a nested one and a layer that is called twice."""
    numbers = np.random.default_rng(4)
    inner = keras.Sequential([layers.Conv2D(4, 3, padding="same", name="conv"), layers.ReLU(name="gate")], name="body")
    shared = layers.Conv2D(4, 3, padding="same", name="shared")
    x = keras.Input((6, 7, 3))
    h = shared(layers.ReLU(name="relu")(shared(inner(x))))
    h = layers.MaxPooling2D(name="pool")(layers.BatchNormalization(name="norm")(h))
    net = keras.Model(x, layers.Dense(5, name="scores")(layers.Flatten(name="flat")(h)), name="net")
    net.set_weights([numbers.normal(size=w.shape) * 0.4 if w.ndim > 1 else w for w in net.get_weights()])
    return net


@pytest.fixture(scope="module")
def net():
    return backbone()


@pytest.fixture
def x():
    return np.random.default_rng(5).normal(size=(2, 6, 7, 3)).astype(np.float32)


def step(net, x):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(net(x, training=False)[:, 2] ** 2)
    return tape.gradient(loss, net.trainable_variables)


def by_hand(net, x):
    """The gradients at the outputs of the convolutions: the network in pieces, each piece's output watched."""
    layer = net.get_layer
    with tf.GradientTape(persistent=True) as tape:
        first = layer("body").get_layer("conv")(tf.constant(x))
        tape.watch(first)
        second = layer("shared")(layer("body").get_layer("gate")(first))
        tape.watch(second)
        third = layer("shared")(layer("relu")(second))
        tape.watch(third)
        rest = layer("flat")(layer("pool")(layer("norm")(third, training=False)))
        loss = tf.reduce_sum(layer("scores")(rest)[:, 2] ** 2)
    return {key: (v.numpy(), tape.gradient(loss, v).numpy()) for key, v in enumerate((first, second, third))}


def test_values_equal_those_of_a_tape(net, x, tmp_path):
    tapes = by_hand(net, x)
    measures = ["keep", "channel-norm", "zero-fraction", "moments", "channel-sums", "histogram"]
    with (
        ut.record(tmp_path / "run", net, sites="conv", measures=measures, phase="both") as r,
        r.batch(samples=["a", "b"], epoch=0),
    ):
        step(net, x)
    run = ut.Run(tmp_path / "run")
    keys = {("body.conv", 0): 0, ("shared", 0): 1, ("shared", 1): 2}
    rows = run.table("kept").to_pylist()
    assert {(row["site"], row["call"], row["phase"]) for row in rows} == {
        (*key, phase) for key in keys for phase in ("forward", "backward")
    }
    for row, values in run.tensors():
        value, gradient = tapes[keys[row["site"], row["call"]]]
        expected = value if row["phase"] == "forward" else gradient
        assert np.allclose(values, expected, rtol=1e-5, atol=1e-6)
    for row in run.table("channel_norm").to_pylist():
        value, gradient = tapes[keys[row["site"], row["call"]]]
        tensor = value if row["phase"] == "forward" else gradient
        norms = np.sqrt((tensor[row["sample"]].astype(np.float64) ** 2).sum((0, 1)))
        assert np.allclose(row["values"], norms, rtol=1e-5)
        assert row["name"] == "ab"[row["sample"]]
    assert run.manifest["sites"]["names"] == ["body.conv", "shared"]
    assert run.manifest["model"]["framework"].startswith("keras 3")


def test_recording_changes_no_gradient_and_leaves_nothing(net, x, tmp_path):
    before = [(id(layer), sorted(vars(layer))) for layer in all_layers(net)]
    plain = [g.numpy() for g in step(net, x)]
    with ut.record(tmp_path / "run", net, sites="**", measures="zero-fraction", phase="both") as recording:
        with recording.batch():
            recorded = [g.numpy() for g in step(net, x)]
        with pytest.raises(ZeroDivisionError), recording.batch():
            raise ZeroDivisionError
    assert all(np.array_equal(a, b) for a, b in zip(plain, recorded, strict=True))
    assert [(id(layer), sorted(vars(layer))) for layer in all_layers(net)] == before


def test_explanations_inside_a_batch_are_not_recorded(net, x, tmp_path):
    with ut.record(tmp_path / "run", net, sites="shared", measures="norm") as recording, recording.batch():
        ut.explain(net, x, rule="guided")
        step(net, x)
        ut.explain(net, x, rule="guided", estimator="smoothgrad:2")
    assert sorted(ut.Run(tmp_path / "run").table("norm")["call"].to_pylist()) == [0, 1]


@pytest.mark.parametrize("options", [{"axes": "bhwc"}, {"optimizer": "adam"}, {"sites": "params"}], ids=str)
def test_what_is_torchs_alone_is_refused(net, options, tmp_path):
    with pytest.raises(ut.UndertowError, match=r"not there for Keras|of Keras none can be yet; select layers"):
        ut.record(tmp_path / "run", net, **{"sites": "conv", **options})


def test_sites_are_dotted_paths_of_every_kind(net, x):
    sites = {site.name: site for site in ut.select(net, "**", example=x)}
    assert list(sites) == ["body.conv", "body.gate", "body", "shared", "relu", "norm", "pool", "flat", "scores"]
    kinds = {"body.conv": "conv", "body.gate": "relu", "norm": "norm", "pool": "pool", "scores": "linear"}
    assert {name: sites[name].kind for name in kinds} == kinds
    assert (sites["shared"].calls, sites["pool"].shape) == (2, (2, 3, 3, 4))
    assert [site.name for site in ut.select(net, "conv[-1], body.*", example=x)] == ["body.conv", "body.gate", "shared"]
    with pytest.raises(ut.InputError, match="did you mean shared"):
        ut.select(net, name="share")


def test_subclassed_networks(x, tmp_path):
    class Block(layers.Layer):
        def __init__(self):
            super().__init__(name="block")
            self.conv = layers.Conv2D(3, 3, name="conv")

        def call(self, v):
            return {"out": tf.nn.relu(self.conv(v)), "raw": v}

    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.block, self.head = Block(), layers.Dense(2, name="head")

        def call(self, v):
            return self.head(self.block(v)["out"])

    net = Net()
    net(x)
    with ut.record(tmp_path / "run", net, sites="block, conv, linear", measures="moments") as r, r.batch():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(net(x))
        tape.gradient(loss, net.trainable_variables)
    rows = ut.Run(tmp_path / "run").table("moments").to_pylist()
    assert {(row["site"], row["output"]) for row in rows} == {("block", "out"), ("block.conv", ""), ("head", "")}


@pytest.mark.filterwarnings("ignore:1 of 2 sites were not recorded")
def test_a_loss_that_goes_on_from_the_logits_is_as_before(x, tmp_path):
    net = keras.Sequential([layers.Flatten(), layers.Dense(3, name="low"), layers.Dense(3, "softmax", name="top")])
    net(x)

    def gradient():
        with tf.GradientTape() as tape:
            loss = keras.losses.sparse_categorical_crossentropy(np.array([1, 2]), net(x))
        return tape.gradient(loss, net.trainable_variables[0]).numpy()

    plain = gradient()
    with ut.record(tmp_path / "run", net, sites="linear", measures="moments") as recording, recording.batch():
        assert np.array_equal(gradient(), plain)
    assert set(recording.unreached) == {"top"}


def test_training_steps_and_resuming(x, tmp_path):
    def train(net, stop=None):
        net.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), run_eagerly=True)
        with ut.record(tmp_path / "run", net, sites="conv", measures="channel-norm") as recording:
            for batch in range(4):
                if batch == stop:
                    raise KeyboardInterrupt
                with recording.batch(samples=["a", "b"], epoch=0):
                    net.train_on_batch(x, np.array([1, 3]))
        return recording

    with pytest.raises(KeyboardInterrupt):
        train(backbone(), stop=2)
    assert not ut.Run(tmp_path / "run").manifest["finished"]
    recording = train(backbone())
    assert (recording.skipped, recording.batches) == (2, 2)
    assert ut.Run(tmp_path / "run").table("channel_norm").num_rows == 4 * 3 * 2


def test_a_scaled_loss_is_divided_out(x, tmp_path):
    net, optimizer = backbone(), keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(), 64.0)
    optimizer.build(net.trainable_variables)

    def record_step(folder, scaler, scale):
        with ut.record(folder, net, sites="conv[0]", measures="keep", scaler=scaler) as recording, recording.batch():
            with tf.GradientTape() as tape:
                loss = scale(tf.reduce_sum(net(x)[:, 1]))
            tape.gradient(loss, net.trainable_variables)
        run = ut.Run(folder)
        return run.tensor(call=0), run.table("batches")["scale"].to_pylist()

    plain, none = record_step(tmp_path / "plain", None, lambda loss: loss)
    scaled, scales = record_step(tmp_path / "scaled", optimizer, optimizer.scale_loss)
    assert np.allclose(plain, scaled, rtol=1e-6)
    assert (none, scales) == ([None], [64.0])


def test_a_traced_step_is_refused(net, x, tmp_path):
    traced = tf.function(lambda v: net(v, training=False))
    refused = pytest.raises(ut.InputError, match=r"'body.conv' ran in a traced graph.*run_eagerly=True")
    with refused, ut.record(tmp_path / "run", net) as recording, recording.batch():
        traced(x)
    assert ut.explain(net, x).rewired == 2  # nothing wrapped stays, and no graph of the wrapped network is cached


@pytest.mark.parametrize("name", ["predicted", "label", "loss"])
def test_objectives_of_photographs(net, x, name):
    net.get_layer("norm").trainable = False
    flags = [(layer.name, layer.trainable) for layer in all_layers(net)]
    variables = [v.trainable for v in net.variables]
    recorder = capability("keras", "record")
    scores = net(x, training=False).numpy()
    with recorder.objective(net, name) as run:
        assert not net.trainable_weights
        layers_read, phases = {"scores": net.get_layer("scores")}, frozenset(["backward"])
        with recorder.new_probe(layers_read, [Keep()], phases, None, None) as probe:
            run(tf.constant(x), None if name == "predicted" else [1, 4])
    (observation,) = probe.transfer([]).wait()
    gradient = observation.states[0]["values"]
    ids = scores.argmax(1) if name == "predicted" else [1, 4]
    one_hot = np.eye(5)[ids]
    softmax = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    assert np.allclose(gradient, softmax - one_hot if name == "loss" else one_hot, atol=1e-5)
    assert [(layer.name, layer.trainable) for layer in all_layers(net)] == flags
    assert [v.trainable for v in net.variables] == variables
    net.get_layer("norm").trainable = True
