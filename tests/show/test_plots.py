"""Charts: what is drawn is what was given, zero is zero, and the axis says what it is."""

import math

import numpy as np
import pytest
from PIL import Image

import undertow as ut
from undertow.runs import SiteQuantiles
from undertow.show import plots

Q = (0.05, 0.5, 0.95)


def row(site: str, *values: float, of: str = "magnitude") -> SiteQuantiles:
    return SiteQuantiles(site, "backward", of, Q, values, 100, 3, 0, {})


GROUPS = {
    "max": [row("conv1", 0, 1e-6, 1e-2), row("conv2", 0, 0, 3e-3)],
    "avg": [row("conv1", 1e-7, 1e-5, 1e-2), row("conv2", 0, 2e-6, 3e-3)],
}


def test_panels_have_one_quantile_each_and_one_bar_for_each_site():
    figure = plots.quantile_panels(GROUPS, title="zeros")
    assert len(figure.axes) == 3
    middle = figure.axes[1]
    assert sorted(bar.get_height() for bar in middle.patches) == sorted([1e-6, 0, 1e-5, 2e-6])
    assert [text.get_text() for text in middle.texts] == ["0"]
    assert middle.get_yscale() == "symlog"
    assert 0 in middle.get_yticks()
    assert "gradient" in figure.axes[0].get_ylabel()
    assert [tick.get_text() for tick in middle.get_xticklabels()] == ["conv1", "conv2"]


def test_curves_mark_the_median():
    figure = plots.quantile_curves(GROUPS)
    assert [axis.get_title() for axis in figure.axes] == ["conv1", "conv2"]
    curve, diamond = figure.axes[0].lines[:2]
    assert list(curve.get_xdata()) == [100 * q for q in Q]
    assert list(curve.get_ydata()) == [0, 1e-6, 1e-2]
    assert (list(diamond.get_xdata()), list(diamond.get_ydata())) == ([50], [1e-6])


def test_a_narrow_span_has_a_linear_scale_from_zero():
    axis = plots.quantile_curves({"a": [row("x", 1.0, 2.0, 3.0, of="channel_norm")]}).axes[0]
    assert axis.get_yscale() == "linear"
    assert axis.get_ylim()[0] == 0
    assert "ℓ2 norm" in axis.get_ylabel()


def test_negative_and_missing_values_are_drawn(tmp_path):
    figure = plots.quantile_curves({"a": [row("x", -1.0, 0.0, 100.0, of="value")], "b": []})
    assert min(figure.axes[0].get_yticks()) < 0
    plots.save(plots.quantile_panels({"a": [row("x", math.nan, 1.0, 2.0)]}), tmp_path / "b.png")


def test_nothing_to_draw_and_a_wrong_ending_are_said(tmp_path):
    for groups in ({}, {"a": []}):
        with pytest.raises(ut.InputError, match="no quantiles to draw"):
            plots.quantile_curves(groups)
        with pytest.raises(ut.InputError, match="no quantiles to draw"):
            plots.quantile_panels(groups)
    with pytest.raises(ut.InputError, match=r"\.png, \.svg or \.pdf"):
        plots.save(plots.quantile_panels(GROUPS), tmp_path / "a.jpg")
    with pytest.raises(ut.InputError, match="did you mean dark"):
        plots.save(plots.quantile_panels(GROUPS), tmp_path / "a.png", ground="darker")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_figure_is_saved_whole_in_each_format(tmp_path, ending, start):
    path = plots.save(plots.quantile_curves(GROUPS), tmp_path / f"a.{ending}")
    assert path.read_bytes().startswith(start)
    assert list(tmp_path.iterdir()) == [path]


def colours_of(figure) -> set[str]:
    from matplotlib.colors import to_hex
    from matplotlib.text import Text

    return {to_hex(text.get_color()) for text in figure.findobj(Text) if text.get_text()}


def test_text_can_be_read_on_the_ground_that_it_is_saved_on(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def contrast(colour: str, other: str) -> float:
        """Of WCAG 2.2."""
        channels = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (colour, other)]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        low, high = sorted(linear @ [0.2126, 0.7152, 0.0722] + 0.05)
        return high / low

    seen, save = {}, Figure.savefig
    figure = plots.quantile_panels(GROUPS, title="zeros")

    def look(self, path, **options):
        seen[path] = colours_of(self)
        save(self, path, **options)

    monkeypatch.setattr(Figure, "savefig", look)
    before = colours_of(figure)
    for ground, papers in {"white": ["#ffffff"], "dark": ["#181818"], "transparent": ["#ffffff", "#000000"]}.items():
        seen.clear()
        path = plots.save(figure, tmp_path / f"{ground}.png", ground=ground)
        (colours,) = seen.values()
        assert all(contrast(colour, paper) >= 4.5 for colour in colours for paper in papers), ground
        with Image.open(path) as picture:
            corner = picture.convert("RGBA").getpixel((0, 0))
        assert corner == {"white": (255,) * 4, "dark": (24, 24, 24, 255)}.get(ground, (255, 255, 255, 0))
    assert colours_of(figure) == before


def test_groups_have_colours_that_anyone_can_tell_apart():
    rgb = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in plots.COLOURS]) / 255
    lightness = np.sort(rgb @ [0.2126, 0.7152, 0.0722])
    assert len(set(plots.COLOURS)) == len(plots.COLOURS)
    assert np.ptp(lightness) > 0.5
