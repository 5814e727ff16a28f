"""A map of one's own as a picture: what the field calls a gradient, whatever holds it."""

import numpy as np
import pytest
import torch
from PIL import Image

import undertow as ut
from undertow.show import draw, heatmap

RNG = np.random.default_rng(0)
VALUES = RNG.normal(0, 1, (3, 20, 30))


def own_magnitude(values: np.ndarray) -> np.ndarray:
    largest = np.maximum(np.maximum(abs(values[0]), abs(values[1])), abs(values[2]))
    return np.asarray(heatmap.heat(np.minimum(largest / np.percentile(largest, 99), 1)))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_a_gradient_of_plain_autograd_is_drawn():
    x = torch.tensor(VALUES[None], requires_grad=True)
    (x**3).sum().backward()
    assert np.array_equal(pixels(draw(x.grad)), own_magnitude(3 * VALUES**2))


@pytest.mark.parametrize(
    "given",
    [
        VALUES,
        VALUES[None],
        torch.tensor(VALUES),
        torch.tensor(VALUES, requires_grad=True),
        torch.tensor(VALUES)[None],
    ],
)
def test_every_form_of_a_map_gives_the_same_picture(given):
    assert np.array_equal(pixels(draw(given)), own_magnitude(VALUES))
    assert np.array_equal(pixels(draw(given, "colour")), heatmap.colour(VALUES))
    assert np.array_equal(pixels(draw(given, "signed")), heatmap.diverging(heatmap.signed(VALUES)))


def test_channels_may_be_last_and_there_may_be_none():
    last = np.moveaxis(VALUES, 0, -1)
    for given in (last, last[None]):
        assert np.array_equal(pixels(draw(given, channels_last=True)), own_magnitude(VALUES))
    assert np.array_equal(pixels(draw(VALUES[0])), pixels(draw(VALUES[:1])))
    assert draw(RNG.normal(0, 1, (512, 7, 9))).size == (9, 7)  # a layer's own channels


def test_bfloat16_and_integers_are_drawn():
    values = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
    assert np.array_equal(pixels(draw(values.bfloat16())), pixels(draw((2 * values).long() / 2)))


def test_a_map_is_laid_over_the_part_of_a_photograph_that_the_network_saw(tmp_path):
    view = RNG.integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(view).save(tmp_path / "view.png")
    expected = heatmap.overlay(view, VALUES)
    for photograph in (view, Image.fromarray(view), tmp_path / "view.png"):
        assert np.array_equal(pixels(draw(VALUES, photograph=photograph)), expected)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (None, {}, r"the map is None, as \.grad is before backward\(\)"),
        (np.zeros((8, 3, 4, 4)), {}, r"shape \(8, 3, 4, 4\) are no map of one image; .*values\[0\]"),
        (np.zeros(5), {}, "no map of one image"),
        (np.zeros((0, 4, 4)), {}, "no map of one image"),
        (np.zeros((4, 5, 3)), {}, r"\(4, 5, 3\) has its channels last; pass channels_last=True"),
        (np.zeros((3, 5, 4)), {"channels_last": True}, "has its channels first; pass channels_last=False"),
        (np.full((1, 2, 2), np.nan), {}, "the map holds NaN or infinity"),
        (np.zeros((1, 2, 2), complex), {}, "complex128 cannot be drawn"),
        (np.zeros((1, 2, 2)), {"style": "color"}, "did you mean colour"),
        (np.zeros((5, 2, 2)), {"style": "colour"}, "cannot be drawn in colour"),
        (VALUES, {"photograph": Image.new("RGB", (60, 40))}, "the map is 20 x 30 and the photograph 40 x 60 x 3"),
        (VALUES, {"photograph": np.zeros((20, 30, 3))}, "float64; pass the part that the network saw"),
        (VALUES, {"photograph": Image.new("RGB", (30, 20)), "style": "colour"}, "over a photograph the magnitude"),
    ],
)
def test_what_cannot_be_drawn_is_said(values, options, message):
    with pytest.raises(ut.InputError, match=message):
        draw(values, **options)
