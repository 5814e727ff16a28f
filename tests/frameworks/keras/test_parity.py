"""The same weights in torch, in Keras on TensorFlow and in Keras on torch give the same maps."""

import pytest

from frameworks.keras.parity import CAM, NETWORKS, RULES, difference, keras_maps, nearest, on_backend, torch_maps

LIMITS = {"float32": 1e-5, "float64": 1e-10}


@pytest.fixture(scope="module")
def maps_on_torch(tmp_path_factory):
    return on_backend(tmp_path_factory.mktemp("maps"), "torch")


@pytest.mark.parametrize("name", NETWORKS)
def test_no_choice_is_so_near_that_rounding_could_turn_it(name: str):
    assert nearest(name) > 1e-5


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", NETWORKS)
def test_maps_equal_torchs(name: str, dtype: str):
    in_torch, in_keras = torch_maps(name, dtype), keras_maps(name, dtype)
    for key in (*RULES, CAM):
        assert difference(in_keras[key], in_torch[key]) <= LIMITS[dtype]
    count = NETWORKS[name][1]
    assert in_torch["rewired"].tolist() == in_keras["rewired"].tolist() == [0, count, count]


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_by_keras_on_torch(name: str, maps_on_torch):
    """In float32 alone: Keras 3.15 on torch multiplies matrices of float64 in float32."""
    in_torch, count = torch_maps(name, "float32"), NETWORKS[name][1]
    for key in (*RULES, CAM):
        assert difference(maps_on_torch[f"{name} {key}"], in_torch[key]) <= LIMITS["float32"]
    assert maps_on_torch[f"{name} rewired"].tolist() == [0, count, count]
