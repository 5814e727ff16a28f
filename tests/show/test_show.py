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


def test_signed_is_the_sum_over_channels_and_zero_is_the_neutral_middle():
    values = RNG.normal(0, 1, (3, 40, 40))
    values[:, 5, 5] = 40.0, 1.0, -41.0
    values[:, 6, 6] = -30.0
    total = values[0] + values[1] + values[2]
    top = np.quantile(np.abs(total), 0.99)
    assert np.allclose(heatmap.signed(values), np.clip(total / top, -1, 1))
    assert heatmap.limit(values, "signed") == pytest.approx(top)
    assert np.allclose(heatmap.signed(-values), -heatmap.signed(values))
    picture = np.asarray(heatmap.draw(values, "signed")).astype(int)
    assert picture[5, 5].tolist() == [247, 247, 247]
    red, _, blue = np.moveaxis(picture, 2, 0)
    assert (red[total > 0.05 * top] > blue[total > 0.05 * top]).all()
    assert (red[total < -0.05 * top] < blue[total < -0.05 * top]).all()
    assert np.unique(np.asarray(heatmap.draw(np.zeros((3, 4, 4)), "signed"))).tolist() == [247]


def test_a_signed_scale_is_as_light_on_both_sides_and_lightest_in_its_middle():
    steps = np.linspace(-1, 1, 65)
    lightness = heatmap.diverging(steps[None]).astype(float)[0] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).tolist() == [True] * 32 + [False] * 32
    assert np.abs(lightness - lightness[::-1]).max() < 40


def test_overlay_shows_the_photograph_where_the_map_is_silent():
    photograph = RNG.integers(0, 255, (6, 6, 3), dtype=np.uint8)
    values = np.zeros((3, 6, 6))
    values[0, 2, 2] = 1.0
    mixed = heatmap.overlay(photograph, values)
    assert np.allclose(mixed[0, 0], photograph[0, 0].mean() * 0.6, atol=1)
    assert mixed[2, 2].tolist() == heatmap.heat(np.array([[1.0]]))[0, 0].tolist()


def test_a_dense_map_leaves_the_photograph_visible():
    photograph = RNG.integers(0, 255, (32, 32, 3), dtype=np.uint8)
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    for values in (np.exp(-(x**2 + y**2)), np.ones((32, 32)), 1 + 0.1 * x):
        mixed = heatmap.overlay(photograph, values[None]).astype(float)
        without = heatmap.overlay(np.zeros_like(photograph), values[None])
        share = (mixed - without).mean(2) / photograph.mean(2)
        assert share.min() > 0.3
        assert np.corrcoef(mixed.mean(2).ravel(), photograph.mean(2).ravel())[0, 1] > 0.6
    strongest = heatmap.overlay(np.zeros_like(photograph), np.exp(-(x**2 + y**2))[None]).sum(2)
    assert strongest[16, 16] > 2 * strongest[0, 0]


def test_wrong_shapes_and_styles_are_said():
    for wrong in (lambda: heatmap.colour(np.zeros((2, 3, 3))), lambda: heatmap.magnitude(np.zeros(4))):
        with pytest.raises(ut.InputError, match="shape"):
            wrong()
    with pytest.raises(ut.InputError, match="did you mean colour"):
        heatmap.draw(np.zeros((3, 2, 2)), "color")


def pixels_of(photograph, image) -> int:
    """How often the photograph stands in a picture, unchanged."""
    pixels = np.asarray(image)[..., :3]
    height, width = photograph.shape[:2]
    corners = np.argwhere((pixels == photograph[0, 0]).all(2))
    return sum(np.array_equal(pixels[y : y + height, x : x + width], photograph) for y, x in corners)


@pytest.mark.parametrize("ground", ["white", "dark", "transparent"])
def test_the_photograph_stands_once_in_a_panel_of_any_rows(ground):
    photograph = RNG.integers(0, 255, (TILE, TILE, 3), dtype=np.uint8)
    values = RNG.normal(0, 1, (3, TILE, TILE))
    for rows in ([("cat", ["guided"])], [("cat", ["gradient", "guided"]), ("dog", ["gradient", "guided"])]):
        drawn = panel(
            photograph, "title", [PanelRow(n, [(rule, values) for rule in rules]) for n, rules in rows], ground=ground
        )
        assert pixels_of(photograph, drawn) == 1
        corner = drawn.convert("RGBA").getpixel((0, 0))
        assert corner == {"white": (255,) * 4, "dark": (24, 24, 24, 255), "transparent": (255, 255, 255, 0)}[ground]


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 300, 200), (5, 20, 20)])
def test_a_panel_has_a_row_for_each_target_and_rule(shape):
    values = RNG.normal(0, 1, shape)
    photograph = RNG.integers(0, 255, (*shape[1:], 3), dtype=np.uint8)
    one = panel(photograph, "title", [PanelRow("cat", [("gradient", values)])])
    two = panel(photograph, "title", [PanelRow("cat", [("gradient", values), ("guided", values)])])
    four = panel(
        photograph, "t" * 900, [PanelRow("c" * 900, [("g" * 900, values), ("guided", values)])] * 2, ["a note"]
    )
    assert one.width == two.width == four.width == GAP + 5 * (TILE + GAP)
    assert two.height > one.height + TILE
    assert four.height > two.height + 2 * TILE


def test_a_map_of_zeros_has_a_panel_and_an_unknown_ground_none():
    photograph = RNG.integers(0, 255, (20, 20, 3), dtype=np.uint8)
    rows = [PanelRow("cat", [("gradient", np.zeros((3, 20, 20)))])]
    assert panel(photograph, "title", rows).height > TILE
    assert heatmap.limit(np.zeros((3, 2, 2)), "signed") == 0
    with pytest.raises(ut.InputError, match="did you mean dark"):
        panel(photograph, "title", rows, ground="darker")
