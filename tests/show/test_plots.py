"""Charts: what is drawn is what was given, zero is zero, and the axis says what it is."""

import math
import sys

import numpy as np
import pytest
from PIL import Image

import undertow as ut
from geometry import faults
from undertow.errors import FrameworkError
from undertow.runs import SiteQuantiles
from undertow.show import labels, plots

Q = (0.05, 0.5, 0.95)


def row(site: str, *values: float, of: str = "magnitude") -> SiteQuantiles:
    return SiteQuantiles(site, "backward", of, Q, values, 100, 3, 0, {})


GROUPS = {
    "max": [row("conv1", 0, 1e-6, 1e-2), row("conv2", 0, 0, 3e-3)],
    "avg": [row("conv1", 1e-7, 1e-5, 1e-2), row("conv2", 0, 2e-6, 3e-3)],
}


def test_a_panel_for_each_quantile_and_in_it_a_bar_for_each_site_and_group():
    figure = plots.quantile_panels(GROUPS, title="zeros")
    assert [axis.get_title() for axis in figure.axes] == ["5 % quantile", "50 % quantile", "95 % quantile"]
    left, middle, _ = figure.axes
    assert sorted(bar.get_width() for bar in middle.patches) == sorted([1e-6, 0, 1e-5, 2e-6])
    assert [text.get_text() for text in middle.texts] == ["0"]
    assert middle.get_xscale() == "symlog"
    assert 0 in middle.get_xticks()
    assert middle.get_xlabel() == "|gradient|,\nobjective per unit of output"
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["conv1", "conv2"]


def test_a_panel_for_each_layer_with_its_median():
    figure = plots.quantile_panels(GROUPS, panels="layer")
    assert [axis.get_title() for axis in figure.axes] == ["conv1\nmedian 1e-06, 1e-05", "conv2\nmedian 0, 2e-06"]
    curve, diamond = figure.axes[0].lines[:2]
    assert list(curve.get_xdata()) == [100 * q for q in Q]
    assert list(curve.get_ydata()) == [0, 1e-6, 1e-2]
    assert (list(diamond.get_xdata()), list(diamond.get_ydata())) == ([50], [1e-6])


def test_many_quantiles_are_drawn_by_layer_unless_asked_otherwise():
    many = tuple(i / 20 for i in range(1, 20))
    rows = [SiteQuantiles(f"conv{i}", "backward", "magnitude", many, many, 9, 0, 0, {}) for i in range(2)]
    assert len(plots.quantile_panels({"a": rows}).axes) == 2
    assert len(plots.quantile_panels({"a": rows}, panels="quantile").axes) == 19
    assert len(plots.quantile_panels(GROUPS, panels="layer").axes) == 2


@pytest.mark.parametrize("panels", plots.PANELS)
@pytest.mark.parametrize("of", ["magnitude", "value"])
def test_all_panels_have_one_scale_and_the_same_limits(panels, of):
    rows = [row("a", -2.0 * (of == "value"), 1.0, 3.0, of=of), row("b", 0, 1e-9, 1e-8, of=of), row("c", 0, 0, 0, of=of)]
    figure = plots.quantile_panels({"x": rows, "y": rows[:2]}, panels=panels)
    along = "x" if panels == "quantile" else "y"
    scales = {
        (getattr(axis, f"get_{along}scale")(), getattr(axis, f"get_{along}lim")(), axis.get_xlim(), axis.get_ylim())
        for axis in figure.axes
    }
    assert len(scales) == 1
    ((scale, (low, high), *_),) = scales
    assert scale == "symlog"
    assert (low < -2, high >= 3) == (of == "value", True)


def test_a_narrow_span_has_a_linear_scale_from_zero():
    axis = plots.quantile_panels({"a": [row("x", 1.0, 2.0, 3.0, of="channel_norm")]}, panels="layer").axes[0]
    assert axis.get_yscale() == "linear"
    assert axis.get_ylim()[0] == 0
    assert axis.get_ylabel() == "ℓ2 norm of a channel's gradient,\nobjective per unit of output"


def test_zeros_and_values_that_are_missing_are_told_apart():
    figure = plots.quantile_panels({"a": [row("x", 0.0, 0.0, 0.0), row("y", *[math.nan] * 3)]})
    assert [text.get_text() for text in figure.axes[1].texts] == ["0", "no finite value"]
    assert [float(tick) for tick in figure.axes[1].get_xticks()] == [0]
    assert "none" in plots.quantile_panels({"a": [row("y", *[math.nan] * 3)]}, panels="layer").axes[0].get_title()


def test_curves_that_hide_each_other_are_said_to_be_one():
    same = [row("conv1", 0, 1e-6, 1e-2)]
    other = [row("conv1", 0, 2e-6, 1e-2)]
    figure = plots.quantile_panels({"a": same, "b": other, "c": same}, panels="layer")
    assert figure.axes[0].get_title().splitlines()[-1] == "one curve: a, c"
    widths = [line.get_linewidth() for line in figure.axes[0].lines if len(line.get_xdata()) > 1]
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) == 3


def test_a_mixed_run_says_which_phases_it_shows():
    rows = [row("conv1", 1, 2, 3), SiteQuantiles("conv1", "forward", "magnitude", Q, (1, 2, 3), 1, 0, 0, {})]
    figure = plots.quantile_panels({"a": rows})
    assert figure.axes[0].get_xlabel() == "|gradient or output|,\nobjective per unit of output"
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["conv1", "conv1 forward"]


def epochs(*values: float) -> list[SiteQuantiles]:
    return [SiteQuantiles("conv1", "backward", "magnitude", Q, values, 1, 0, 0, {"epoch": epoch}) for epoch in range(3)]


LONG = [f"{'very_' * 60}long.{i}.$x_1$.{'W' * 200}" for i in range(3)]
LAYOUTS = {
    "one group": {"max": GROUPS["max"]},
    "two groups": GROUPS,
    "nine groups": {f"run {i}": [row(f"conv{j}", 0, i * 1e-6, 1e-3) for j in range(4)] for i in range(9)},
    "all zero": {"a": [row("conv1", 0, 0, 0), row("conv2", 0, 0, 0)]},
    "negative": {"a": [row(f"conv{i}", -(10.0**-i), 0, 1e-9, of="value") for i in range(6)]},
    "all negative": {"a": [row("x", -3, -2, -1, of="value")]},
    "narrow": {"a": [row("x", 1.0, 1.5, 2.0)]},
    "wide": {"a": [row("x", 1e-38, 1.0, 1e30), row("y", -1e-38, 1.0, 1e30)]},
    "14 layers": {"a": [row(f"features.denseblock4.layer{i}.conv", 0, i / 14, 1) for i in range(14)]},
    "long names": {name: [row(other, 0, 1e-6, 1e-3) for other in LONG] for name in LONG},
    "epochs": {"a": epochs(1, 2, 3), "b": epochs(0, 0, 1)},
    "uneven": {"a": [row("x", 0, 1, 2), row("y", 0, 1, 2)], "b": [row("z", 0, 1, 2)], "c": []},
    "one site": {"a": [row("x", 0, 1, 2)]},
}


@pytest.mark.parametrize("panels", plots.PANELS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_nothing_covers_a_label_and_all_of_it_is_in_the_frame(name, panels):
    figure = plots.quantile_panels(LAYOUTS[name], "A title", panels=panels)
    assert faults(figure) == []
    labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()] if panels == "quantile" else []
    labels = labels or [axis.get_title().splitlines()[0] for axis in figure.axes]
    assert len(set(labels)) == len(labels), "names that tell layers apart"


def test_a_layout_with_a_fault_is_seen():
    """The check itself: a label on a curve, on another text, outside."""
    figure = plots.quantile_panels(GROUPS, panels="layer")
    axis = figure.axes[0]
    axis.annotate("0", (95, 1e-2), ha="center", va="center")
    figure.text(0.99, 0.5, "too far to the right")
    axis.annotate("a", (0, 0), xycoords="axes fraction", xytext=(0, -8), textcoords="offset points")
    found = " ".join(faults(figure))
    assert "'0' lies on a line" in found
    assert "leaves the frame" in found


def test_nothing_to_draw_and_a_wrong_ending_are_said(tmp_path):
    for groups in ({}, {"a": []}):
        with pytest.raises(ut.InputError, match="no quantiles to draw"):
            plots.quantile_panels(groups)
    with pytest.raises(ut.InputError, match="did you mean layer"):
        plots.quantile_panels(GROUPS, panels="layers")
    with pytest.raises(ut.InputError, match="201 layers are too many"):
        plots.quantile_panels({"a": GROUPS["max"][:1] * 201}, panels="layer")
    with pytest.raises(ut.InputError, match=r"\.png, \.svg or \.pdf"):
        plots.save(plots.quantile_panels(GROUPS), tmp_path / "a.jpg")
    with pytest.raises(ut.InputError, match="did you mean dark"):
        plots.save(plots.quantile_panels(GROUPS), tmp_path / "a.png", ground="darker")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_figure_is_saved_whole_in_each_format(tmp_path, ending, start):
    path = plots.save(plots.quantile_panels(GROUPS), tmp_path / f"a.{ending}")
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


def test_without_matplotlib_any_drawing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (plots.new_figure, lambda: labels.fitted("conv1", 100, 8), lambda: labels.legible("conv1")):
        with pytest.raises(FrameworkError, match=r'run: pip install "undertow\[plot\]"'):
            draw()
