"""The same weights in torch and in Keras give the same maps."""

import pytest

from frameworks.keras.parity import NETWORKS, difference, nearest


@pytest.mark.parametrize("name", NETWORKS)
def test_no_choice_is_so_near_that_rounding_could_turn_it(name: str):
    assert nearest(name) > 1e-5


@pytest.mark.parametrize("rule", ["gradient", "deconvnet", "guided"])
@pytest.mark.parametrize("name", NETWORKS)
def test_maps_equal_torchs(name: str, rule: str):
    relative, in_torch, in_keras = difference(name, rule, "float32")
    assert relative <= 1e-5
    assert in_torch == in_keras == (0 if rule == "gradient" else NETWORKS[name][1])


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_equal_torchs_but_for_rounding(name: str):
    assert difference(name, "guided", "float64")[0] <= 1e-13
