"""Every awkward Keras network, every rule and both ways, against the independent twin."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import undertow as ut
from frameworks.keras.networks import AWKWARD, SMOOTH, Network
from frameworks.keras.references import reference

pytestmark = pytest.mark.filterwarnings("ignore:.*left alone on the way:undertow.UndertowWarning")


def own_mixture(g, local):
    """Guided, less half of its mirror image: `local` is asked twice, and no shortcut could stand in for it."""
    return local(ut.rules.relu(g)) - 0.5 * local(ut.rules.relu(-g))


def assert_near(actual, expected):
    for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (actual, expected)), strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= 2e-6 * np.abs(b).max()
        assert np.abs(b).max() > 0


@pytest.mark.parametrize(
    ("network", "activations"),
    [*((network, "relu-like") for network in AWKWARD), *((network, "all") for network in SMOOTH)],
    ids=str,
)
def test_graph_and_swap_equal_the_twin(network: Network, activations: str):
    rewired = network.rewired_all if activations == "all" else network.rewired
    model, x = network.build()
    if not isinstance(model, keras.Layer):
        x = tf.constant(x)  # an array says nothing of whose function it is for
    for rule in ("deconvnet", own_mixture):
        if rewired == 0:
            with pytest.raises(ut.RuleError, match="found no activation to rewire"):
                ut.explain(model, x, rule=rule, target=1, activations=activations)
            continue
        values, calls = reference(*(network.twin or network.build)(), 1, rule, activations)
        a = ut.explain(model, x, rule=rule, target=1, activations=activations)
        assert_near(a.numpy(), values)
        assert (a.rewired, calls) == (rewired, rewired)
    if rewired and network.swap:
        a = ut.explain(model, x, rule=own_mixture, target=1, activations=activations, through="swap")
        assert_near(a.values, values)
        assert a.rewired == rewired
    elif rewired:
        with pytest.raises(ut.RuleError, match=r"missed|could not clone|that can be cloned"):
            ut.explain(model, x, target=1, activations=activations, through="swap")
