"""The networks people use, random weights: counts and maps equal to the twin's."""

import gc

import keras
import numpy as np
import pytest

import undertow as ut
from frameworks.keras.references import reference


@pytest.fixture
def float64():
    """In float32 a value within rounding of 0 may fall to either side of a ReLU, and so move a map by more than that.

    A graph and a call without one round differently, and how depends on the processor.
    """
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(before[0])
    keras.config.set_dtype_policy(before[1])


NETWORKS = {"DenseNet201": 201, "ResNet50": 49, "VGG16": 15, "MobileNetV2": 35}  # with their ReLU calls
SMOOTH = {"EfficientNetB0": 49, "ConvNeXtTiny": 18}  # with their swish and GELU calls


@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings("ignore:guided. left alone on the way, as the gradient passes them. Sigmoid x16")
@pytest.mark.parametrize("name", [*NETWORKS, *SMOOTH])
def test_counts_and_maps_equal_the_twins(name: str):
    keras.utils.set_random_seed(3)
    build = getattr(keras.applications, name)
    model = build(weights=None, input_shape=(32, 32, 3), classes=7, classifier_activation=None)
    x = np.random.default_rng(7).normal(size=(1, 32, 32, 3))
    assert model.weights[0].dtype == "float64"
    activations = "all" if name in SMOOTH else "relu-like"
    values, calls = reference(model, x, 5, "guided", activations)
    a = ut.explain(model, x, rule="guided", target=5, activations=activations)
    assert a.rewired == calls == (NETWORKS | SMOOTH)[name]
    assert a.values.dtype == values.dtype == np.float64
    assert np.abs(a.values - values).max() <= 1e-10 * np.abs(values).max()
    assert np.abs(values).max() > 0
    keras.backend.clear_session()
    gc.collect()
