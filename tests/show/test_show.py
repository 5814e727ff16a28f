"""Pictures from arrays: the display conventions, by hand."""

import numpy as np
import pytest

import undertow as ut
from undertow.show import heatmap
from undertow.show.panel import GAP, TILE, PanelRow, panel

RNG = np.random.default_rng(0)


def test_colour_is_a_tenth_of_a_standard_deviation_about_mid_grey():
    values = RNG.normal(3, 5, (3, 20, 30))
    shown = heatmap.colour(values)
    score = (values - values.mean()) / values.std()
    expected = np.floor(255 * np.clip(0.5 + 0.1 * score, 0, 1)).transpose(1, 2, 0)
    assert np.array_equal(shown, expected)
    assert heatmap.colour(1000 * values - 7).tolist() == shown.tolist()


def test_colour_clips_and_one_channel_is_grey():
    values = np.zeros((1, 10, 10))
    values[0, 0, 0] = 100.0
    shown = heatmap.colour(values)
    assert shown[0, 0].tolist() == [255, 255, 255]
    assert (shown[..., 0] == shown[..., 2]).all()


def test_magnitude_is_the_largest_over_channels_clipped_at_its_99th_percentile():
    values = RNG.normal(0, 1, (3, 40, 40))
    values[1, 5, 5] = -50.0
    largest = np.maximum(np.maximum(abs(values[0]), abs(values[1])), abs(values[2]))
    top = np.percentile(largest, 99)
    assert np.allclose(heatmap.magnitude(values), np.minimum(largest / top, 1))
    assert heatmap.magnitude(values)[5, 5] == 1
    assert heatmap.magnitude(np.zeros((3, 2, 2))).tolist() == [[0, 0], [0, 0]]


def test_a_map_with_a_single_pixel_is_still_shown():
    values = np.zeros((1, 30, 30))
    values[0, 3, 4] = -2.0
    assert heatmap.magnitude(values)[3, 4] == 1


def test_heat_gets_lighter_all_the_way():
    lightness = heatmap.heat(np.linspace(0, 1, 64)[None]).astype(float)[0] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).all()


def test_overlay_shows_the_photograph_where_the_map_is_silent():
    photograph = RNG.integers(0, 255, (6, 6, 3), dtype=np.uint8)
    values = np.zeros((3, 6, 6))
    values[0, 2, 2] = 1.0
    mixed = heatmap.overlay(photograph, values)
    assert np.allclose(mixed[0, 0], photograph[0, 0].mean() * 0.6, atol=1)
    assert mixed[2, 2].tolist() == heatmap.heat(np.array([[1.0]]))[0, 0].tolist()


def test_wrong_shapes_and_styles_are_said():
    for wrong in (lambda: heatmap.colour(np.zeros((2, 3, 3))), lambda: heatmap.magnitude(np.zeros(4))):
        with pytest.raises(ut.InputError, match="shape"):
            wrong()
    with pytest.raises(ut.InputError, match="did you mean colour"):
        heatmap.draw(np.zeros((3, 2, 2)), "color")


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 300, 200), (5, 20, 20)])
def test_a_panel_has_a_row_for_each_target_and_two_tiles_for_each_rule(shape):
    values = RNG.normal(0, 1, shape)
    photograph = RNG.integers(0, 255, (*shape[1:], 3), dtype=np.uint8)
    one = panel(photograph, "title", [PanelRow("cat", [("gradient", values), ("guided", values)])])
    two = panel(photograph, "title", [PanelRow("cat", [("gradient", values), ("guided", values)])] * 2, ["a note"])
    assert one.width == two.width == GAP + 5 * (TILE + GAP)
    assert two.height > one.height + TILE
