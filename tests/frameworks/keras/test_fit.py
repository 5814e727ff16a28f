"""Recording in `fit`: the training is the same, compiled or not, and the rows are those of a loop by hand."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import undertow as ut
from undertow.keras import GradientRecorder

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def network(**options):
    keras.utils.clear_session()  # else layers are numbered on
    keras.utils.set_random_seed(0)
    parts = [layers.Conv2D(3, 3, activation="relu", name="conv"), layers.Flatten(), layers.Dropout(0.5, seed=1)]
    model = keras.Sequential([keras.Input((6, 6, 1)), *parts, layers.Dense(3, name="scores")])
    model.compile(
        **{"optimizer": keras.optimizers.SGD(0.1, momentum=0.9), "loss": LOSS, "metrics": ["accuracy"], **options}
    )
    return model


@pytest.fixture(scope="module")
def data():
    numbers = np.random.default_rng(0)
    return numbers.normal(size=(22, 6, 6, 1)).astype("float32"), numbers.integers(0, 3, 22)


def fit(model, data, *callbacks, **options):
    how = {"batch_size": 4, "epochs": 2, "shuffle": False, "verbose": 0, "validation_data": data}
    return model.fit(*data, callbacks=list(callbacks), **{**how, **options})


def recorder(folder, **options):
    return GradientRecorder(folder, **{"sites": "conv, linear", "measures": ["norm", "channel-norm"], **options})


def by_hand(folder, data, wants):
    model = network(run_eagerly=True)
    with ut.record(folder, model, sites="conv, linear", measures=["norm", "channel-norm"]) as recording:
        for epoch in range(2):
            for start in range(0, 22, 4):
                x, y = (array[start : start + 4] for array in data)
                if wants(start // 4):
                    with recording.batch(epoch=epoch, batch=start // 4):
                        model.train_on_batch(x, y)
                else:
                    model.train_on_batch(x, y)
    return ut.Run(folder)


@pytest.mark.parametrize("compiled", [{}, {"jit_compile": False}, {"run_eagerly": True}], ids=str)
def test_fit_is_recorded_and_trains_as_it_would(tmp_path, data, compiled):
    plain, model = network(**compiled), network(**compiled)
    history = fit(plain, data).history
    function = model.train_function
    own = recorder(tmp_path / "run", schedule=ut.Schedule(every=2))
    recorded = fit(model, data, own).history
    for name, values in history.items():
        assert np.allclose(values, recorded[name], atol=1e-4), name
    for a, b in zip(plain.get_weights(), model.get_weights(), strict=True):
        assert np.allclose(a, b, atol=1e-5)
    assert function is None
    assert model.train_function != own._train
    assert "train_step" not in vars(model)
    assert model.run_eagerly == bool(compiled.get("run_eagerly"))
    run, wanted = ut.Run(tmp_path / "run"), by_hand(tmp_path / "hand", data, lambda batch: batch % 2 == 0)
    assert run.finished
    for table, column in (("norm", "norm"), ("channel_norm", "values")):
        rows, twins = run.table(table).to_pylist(), wanted.table(table).to_pylist()
        assert len(rows) == len(twins) > 0
        for row, twin in zip(rows, twins, strict=True):
            assert [row[key] for key in ("epoch", "batch", "site")] == [twin[key] for key in ("epoch", "batch", "site")]
            assert np.allclose(row[column], twin[column], rtol=1e-3, atol=1e-5)


def test_names_come_from_the_data(tmp_path):
    x = {"image": np.ones((6, 6, 6, 1), "float32"), "name": [f"{i}.png" for i in range(6)]}
    batches = tf.data.Dataset.from_tensor_slices((x, np.zeros(6, int))).batch(3)

    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.conv, self.low = layers.Conv2D(2, 3, name="conv"), layers.Dense(3, name="low")

        def call(self, inputs):
            return self.low(tf.reshape(self.conv(inputs["image"]), (-1, 32)))

    model = Net()
    model.compile("sgd", LOSS)
    own = recorder(tmp_path / "run", sites="conv", samples=lambda batch: batch[0]["name"])
    with pytest.raises(ut.InputError, match="no weights yet; call it once"):
        model.fit(batches, shuffle=False, verbose=0, callbacks=[own])
    model({"image": x["image"]})
    model.fit(batches, shuffle=False, verbose=0, callbacks=[own])
    rows = ut.Run(tmp_path / "run").table("channel_norm").to_pylist()
    assert [row["name"] for row in rows] == [f"{i}.png" for i in range(6)]


def test_an_error_leaves_a_run_and_the_model_as_it_was(tmp_path, data):
    class Stops(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 3:
                raise ZeroDivisionError

    model = network()
    with pytest.raises(ZeroDivisionError), recorder(tmp_path / "run") as own:
        fit(model, data, own, Stops(), epochs=1)
    assert model.train_function != own._train
    half = ut.Run(tmp_path / "run")
    assert not half.finished
    assert half.table("batches")["batch"].to_pylist() == [0, 1, 2, 3]
    fit(network(), data, own, epochs=1)
    assert ut.Run(tmp_path / "run").table("batches")["batch"].to_pylist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ut.RunError, match="is a finished run; choose another folder"):
        fit(network(), data, own, epochs=1)


@pytest.mark.parametrize("recorded", [2, 9])
def test_a_step_that_fails_leaves_a_run(tmp_path, data, recorded):
    def batches():
        yield from [(data[0][:4], data[1][:4])] * 2
        raise ZeroDivisionError("no third batch")

    model, own = network(), recorder(tmp_path / "run", schedule=ut.Schedule(first=recorded))
    kinds = tf.TensorSpec((4, 6, 6, 1)), tf.TensorSpec((4,), tf.int64)
    with pytest.raises(tf.errors.OpError, match="no third batch"):
        model.fit(
            tf.data.Dataset.from_generator(batches, output_signature=kinds), shuffle=False, verbose=0, callbacks=[own]
        )
    assert model.train_function != own._train
    run = ut.Run(tmp_path / "run")
    assert not run.finished
    assert run.table("batches")["batch"].to_pylist() == [0, 1]


def test_what_cannot_be_told_apart_is_refused(tmp_path, data):
    with pytest.raises(ut.InputError, match="steps_per_execution is over 1"):
        fit(network(steps_per_execution=2), data, recorder(tmp_path / "run"))
    with pytest.raises(ut.InputError, match="first= is no option"):
        GradientRecorder(tmp_path, first=3)


@pytest.mark.parametrize("compiled", [{}, {"jit_compile": True}, {"run_eagerly": True}], ids=str)
@pytest.mark.parametrize("before", [False, True], ids=["first", "compiled before"])
def test_a_recording_around_fit_itself(tmp_path, data, compiled, before):
    """Right where it runs eagerly, else refused with the remedy."""
    model = network(**compiled)
    x, y = (array[:4] for array in data)
    if before:
        model.fit(x, y, batch_size=4, verbose=0)

    def record():
        with ut.record(tmp_path / "run", model, sites="conv", measures="norm") as recording, recording.batch():
            model.fit(x, y, batch_size=4, verbose=0)

    if compiled == {"run_eagerly": True}:
        record()
        assert len(ut.Run(tmp_path / "run").table("norm")) > 0
        return
    warned = pytest.warns(UserWarning, match="nothing was recorded of batch 0") if before else contextlib.nullcontext()
    with warned, pytest.raises(ut.InputError, match=r"undertow\.keras\.GradientRecorder to fit"):
        record()
