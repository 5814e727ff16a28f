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


@pytest.fixture
def figures(monkeypatch):
    """What was drawn, before it is saved."""
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    return drawn


def test_bars_one_panel_for_each_quantile_one_bar_for_each_site(tmp_path, figures):
    path = plots.bars(GROUPS, [0.5, 0.95], tmp_path / "bars.png", title="zeros")
    with Image.open(path) as picture:
        assert min(picture.size) > 300
    (figure,) = figures
    assert len(figure.axes) == 2
    middle = figure.axes[0]
    assert sorted(bar.get_height() for bar in middle.patches) == sorted([1e-6, 0, 1e-5, 2e-6])
    assert [text.get_text() for text in middle.texts] == ["0"]
    assert middle.get_yscale() == "symlog"
    assert 0 in middle.get_yticks()
    assert "gradient" in middle.get_ylabel()
    assert [tick.get_text() for tick in middle.get_xticklabels()] == ["conv1", "conv2"]


def test_curves_mark_the_median(tmp_path, figures):
    plots.quantile_curves(GROUPS, tmp_path / "curves.svg")
    (figure,) = figures
    assert [axis.get_title() for axis in figure.axes] == ["conv1", "conv2"]
    curve, diamond = figures[0].axes[0].lines[:2]
    assert list(curve.get_xdata()) == [100 * q for q in Q]
    assert list(curve.get_ydata()) == [0, 1e-6, 1e-2]
    assert (list(diamond.get_xdata()), list(diamond.get_ydata())) == ([50], [1e-6])


def test_a_narrow_span_has_a_linear_scale_from_zero(tmp_path, figures):
    plots.quantile_curves({"a": [row("x", 1.0, 2.0, 3.0, of="channel_norm")]}, tmp_path / "a.pdf")
    axis = figures[0].axes[0]
    assert axis.get_yscale() == "linear"
    assert axis.get_ylim()[0] == 0
    assert "ℓ2 norm" in axis.get_ylabel()


def test_negative_and_missing_values_are_drawn(tmp_path, figures):
    plots.quantile_curves({"a": [row("x", -1.0, 0.0, 100.0, of="value")], "b": []}, tmp_path / "a.png")
    assert min(figures[0].axes[0].get_yticks()) < 0
    plots.bars({"a": [row("x", math.nan, 1.0, 2.0)]}, [0.05], tmp_path / "b.png")


def test_nothing_to_draw_and_a_wrong_ending_are_said(tmp_path):
    for groups in ({}, {"a": []}):
        with pytest.raises(ut.InputError, match="no quantiles to draw"):
            plots.quantile_curves(groups, tmp_path / "a.png")
    with pytest.raises(ut.InputError, match=r"\.png, \.svg or \.pdf"):
        plots.bars(GROUPS, [0.5], tmp_path / "a.jpg")
    assert list(tmp_path.iterdir()) == []


def test_groups_have_colours_that_anyone_can_tell_apart():
    rgb = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in plots.COLOURS]) / 255
    lightness = np.sort(rgb @ [0.2126, 0.7152, 0.0722])
    assert len(set(plots.COLOURS)) == len(plots.COLOURS)
    assert np.ptp(lightness) > 0.5
