"""Charts of quantiles, as `undertow.runs` returns them; nothing here sees a model or a run."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import InputError, did_you_mean
from ..files import published
from .ground import on_ground
from .labels import digits, drawn, fitted, font_manager, told_apart, width_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image


class QuantileCurve(Protocol):
    """The quantiles of one site, as `undertow.runs.SiteQuantiles` holds them."""

    @property
    def label(self) -> str:
        """The site's name, with the phase where that needs telling."""

    @property
    def of(self) -> str:
        """What they are quantiles of."""

    @property
    def phase(self) -> str:
        """Of the gradient, of the output, or what of a parameter."""

    @property
    def q(self) -> tuple[float, ...]:
        """Fractions in [0, 1]."""

    @property
    def values(self) -> tuple[float, ...]:
        """For each its quantile."""

    @property
    def by(self) -> Mapping[str, Any]:
        """Further columns that tell this group from others."""


Groups = Mapping[str, Sequence[QuantileCurve]]
Curves = Mapping[str, "QuantileCurve | None"]

PANELS = ("quantile", "layer")
MAX_QUANTILES = 6  # with more of them, panels are by layer unless asked otherwise
MAX_LAYERS = 200  # with more of them, by quantile

# Okabe and Ito's palette: distinguishable with any colour vision. Source: jfly.uni-koeln.de/color
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#5A5A62"
_OF = {
    "magnitude": "|{}|",
    "value": "{}",
    "channel_norm": "ℓ2 norm of a channel's {}",
    "norm": "ℓ2 norm of the {}",
    "rms": "root mean square of the {}",
    "zero_fraction": "fraction of zeros in the {}",
}
_PHASES = {  # what is looked at, and its unit
    "backward": ("gradient", "objective per unit of output"),
    "forward": ("output", ""),
    "gradient": ("gradient", "objective per unit of weight"),
    "accumulated": ("accumulated gradient", "objective per unit of weight"),
}
_SMALL, _TEXT, _LARGE = 7.0, 8.0, 10.0  # points
_INCH = 72  # points
_NAMES = 2.6 * _INCH  # the most that names of sites take
_APART = 0.16  # of an axis: the least distance between two labels
_SAME = 2**-8  # the relative error of a histogram's quantiles: nearer than that, values are one


def quantile_panels(groups: Groups, title: str = "", *, panels: str | None = None) -> "Figure":
    """Draw quantiles side by side, with one scale and the same limits in all panels.

    Args:
        groups: for each label, such as a run's name, the quantiles of its sites, in order, all of the same fractions.
        title: at the top of the figure.
        panels: "quantile", a panel each, with a bar for each site and group; "layer", a panel for each site, with a
            curve for each group, its median marked and written above; None takes the former for up to six quantiles.

    Curves that hide each other are drawn one within the other, and it is said that they are one. Groups without rows
    are left out.

    Raises:
        InputError: nothing to draw, unknown panels, or over 200 layers with a panel each.
        FrameworkError: matplotlib is missing.
    """
    if panels is not None and panels not in PANELS:
        raise InputError(f"unknown panels {panels!r}{did_you_mean(panels, PANELS)} (known: {', '.join(PANELS)})")
    groups = {label: rows for label, rows in groups.items() if rows}
    if not groups or not _fractions(groups):
        raise InputError("there are no quantiles to draw; was anything recorded?")
    n_sites = len(_site_names(groups))
    few = len(_fractions(groups)) <= MAX_QUANTILES
    if panels == "layer" and n_sites > MAX_LAYERS:
        raise InputError(f"{n_sites:,} layers are too many for a panel each; take panels by quantile, or fewer layers")
    if panels == "quantile" or (panels is None and (few or n_sites > MAX_LAYERS)):
        return _by_quantile(groups, title)
    return _by_layer(groups, title)


def _by_quantile(groups: Groups, title: str) -> "Figure":
    """Draw a panel for each quantile, and in it a bar for each site and group."""
    q, names = _fractions(groups), _site_names(groups)
    labels = told_apart(names, _NAMES, _TEXT)
    columns = min(len(q), 3 if len(q) in (5, 6) else 4 if len(names) <= 40 else 10)
    pitch = min(0.13 * len(groups) + 0.09, 150 / len(names) / math.ceil(len(q) / columns))  # inches for a site
    left = max(width_of(label, _TEXT) for label in labels) / _INCH
    figure, axes = _figure(len(q), columns, left + 0.4 + 2.6 * columns, max(pitch * len(names), 0.9) + 0.75)
    for i, (fraction, axis) in enumerate(zip(q, axes, strict=True)):
        _bars(axis, groups, fraction, pitch * _INCH)
        axis.set_ylim(len(names) - 0.5, -0.5)
        shown = labels if i % columns == 0 else [""] * len(names)
        axis.set_yticks(range(len(names)), shown, fontsize=min(_TEXT, 0.9 * pitch * _INCH))
        axis.tick_params(axis="y", length=0)
        axis.set_title(f"{100 * fraction:g} % quantile", fontsize=_LARGE)
        if i + columns >= len(axes):
            axis.set_xlabel(_unit(groups), fontsize=_TEXT)
    _one_scale(axes, "x", _values(groups))
    return _finished(figure, axes, groups, title)


def _bars(axis: Any, groups: Groups, fraction: float, pitch: float) -> None:
    """Draw one quantile of all groups; `pitch` is the height of a site in points. A value of zero is written as 0."""
    thickness = 0.8 / len(groups)
    for i, (label, rows) in enumerate(groups.items()):
        values = [row.values[row.q.index(fraction)] for row in rows]
        y = [site + (i - (len(groups) - 1) / 2) * thickness for site in range(len(rows))]
        axis.barh(y, values, 0.9 * thickness, **_bar_style(i), label=drawn(label))
        for position, value in zip(y, values, strict=True):
            if value == 0 or math.isnan(value):
                text = "0" if value == 0 else "no finite value"
                size = min(_SMALL, 0.85 * thickness * pitch)
                axis.annotate(text, (0, position), (3, 0), textcoords="offset points", va="center_baseline",
                              fontsize=size, color=GREY)  # fmt: skip


def _by_layer(groups: Groups, title: str) -> "Figure":
    """Draw a panel for each site, and in it a curve for each group; above it the medians, and which curves are one."""
    names = _site_names(groups)
    columns = min(len(names), 4)
    figure, axes = _figure(len(names), columns, 0.9 + 2.9 * columns, 2.9)
    room = 2.5 * _INCH
    for i, (axis, name) in enumerate(zip(axes, told_apart(names, room, _TEXT + 1), strict=True)):
        curves = {label: rows[i] if i < len(rows) else None for label, rows in groups.items()}
        _curves(axis, curves)
        axis.set_title("\n".join([name, *_remarks(curves, room)]), fontsize=_TEXT + 1)
        axis.tick_params(labelsize=_TEXT, labelleft=i % columns == 0)
        if i + columns >= len(axes):
            axis.set_xlabel("quantile, %", fontsize=_TEXT)
        if i % columns == 0:
            axis.set_ylabel(_unit(groups), fontsize=_TEXT)
    _one_scale(axes, "y", _values(groups))
    return _finished(figure, axes, groups, title)


def _curves(axis: Any, curves: Curves) -> None:
    """Draw one site's curves, with a diamond at the median."""
    for i, (label, row) in enumerate(curves.items()):
        if row is not None:
            style = _line_style(i, len(curves))
            axis.plot([100 * q for q in row.q], row.values, marker="o", markersize=3, label=drawn(label), **style)
            if 0.5 in row.q:
                median = row.values[row.q.index(0.5)]
                axis.plot([50], [median], "D", ms=7, color=style["color"], markeredgecolor="white", clip_on=False)


def save(figure: "Figure", path: str | Path, *, ground: str = "white") -> Path:
    """Write a figure as a PNG, SVG or PDF; the file is replaced atomically, and the figure is as before.

    Args:
        path: ends in .png, .svg or .pdf.
        ground: "white", "dark" or "transparent", which can be read on white and on black.

    Raises:
        InputError: another ending or ground.
    """
    path = check_ending(path)
    with on_ground(figure, ground), published(path) as aside:
        figure.savefig(aside, dpi=120)
    return path


def new_figure(**options: Any) -> "Figure":
    """Return a new `matplotlib.figure.Figure`.

    Raises:
        FrameworkError: matplotlib is missing.
    """
    font_manager()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from .figure import NotebookFigure

    figure = NotebookFigure(**options)
    FigureCanvasAgg(figure)  # else figure.canvas.draw() lays nothing out
    return figure


def as_image(figure: "Figure", dpi: int = 100) -> "Image":
    """Return a figure as a Pillow picture, on white."""
    from PIL import Image

    from .figure import picture

    return Image.open(io.BytesIO(picture(figure, dpi)))


def drawn_or_saved(figure: "Figure", path: str | Path | None, ground: str = "white") -> "Figure":
    """Return a figure, written to a path where one is given, as `save` does it."""
    if path is not None:
        save(figure, path, ground=ground)
    return figure


def check_ending(path: str | Path) -> Path:
    """Return the path of a chart.

    Raises:
        InputError: it does not end in .png, .svg or .pdf.
    """
    path = Path(path)
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"{path.name!r} must end in .png, .svg or .pdf")
    return path


def _fractions(groups: Groups) -> tuple[float, ...]:
    return next(iter(groups.values()))[0].q


def _site_names(groups: Groups) -> list[str]:
    """Return what each site is called; by all its names where the groups differ in it."""
    n_sites = max(len(rows) for rows in groups.values())
    at = [[rows[i] for rows in groups.values() if i < len(rows)] for i in range(n_sites)]
    return [" / ".join(dict.fromkeys(_site_name(row) for row in rows)) for rows in at]


def _site_name(row: "QuantileCurve") -> str:
    return ", ".join([row.label, *(f"{column} {value}" for column, value in row.by.items())])


def _values(groups: Groups) -> list[float]:
    return [value for rows in groups.values() for row in rows for value in row.values if math.isfinite(value)]


def _unit(groups: Groups) -> str:
    """Say what is drawn, and on a second line in which unit."""
    rows = [row for rows in groups.values() for row in rows]
    of = rows[0].of
    phases = dict.fromkeys(_PHASES.get(row.phase, (row.phase, "")) for row in rows)
    text = _OF.get(of, f"{of} of the {{}}").format(" or ".join(dict.fromkeys(thing for thing, _ in phases)))
    units = dict.fromkeys(unit for _, unit in phases if unit)
    return text if of == "zero_fraction" else ",\n".join([text, *units])


def _remarks(curves: Curves, room: float) -> list[str]:
    """Return lines for above a panel: its medians, and which of its curves are one."""
    rows = {label: row for label, row in curves.items() if row is not None}
    q, lines = next(iter(rows.values())).q, []
    if 0.5 in q:
        text = f"median {', '.join(digits(row.values[q.index(0.5)]) for row in rows.values())}"
        lines += [text] if width_of(text, _TEXT + 1) <= room else []
    alike = [tuple(label for label, row in rows.items() if _one_curve(row, other)) for other in rows.values()]
    together = dict.fromkeys(labels for labels in alike if len(labels) > 1)
    return [*lines, *(fitted(f"one curve: {', '.join(labels)}", room, _TEXT + 1) for labels in together)]


def _one_curve(row: "QuantileCurve", other: "QuantileCurve") -> bool:
    return all(math.isclose(a, b, rel_tol=_SAME) for a, b in zip(row.values, other.values, strict=True))


def _bar_style(group: int) -> dict[str, Any]:
    """Return a colour for each of seven groups, and hatched ones for further groups."""
    hatch = ("", "////", "....", "xxxx")[group // len(COLOURS) % 4]
    return {"color": COLOURS[group % len(COLOURS)], "hatch": hatch, "edgecolor": "white", "linewidth": 0}


def _line_style(group: int, groups: int) -> dict[str, Any]:
    """Return a colour and dashes; earlier lines are wider, so that later ones do not hide them."""
    dashes = ("-", "--", ":", "-.")[group // len(COLOURS) % 4]
    return {"color": COLOURS[group % len(COLOURS)], "linestyle": dashes,
            "linewidth": 1.4 + 1.3 * min(groups - 1 - group, 2), "clip_on": False}  # fmt: skip


def _figure(panels: int, columns: int, width: float, height: float) -> "tuple[Figure, list[Any]]":
    """Return a figure of this width and its panels, each `height` inches high."""
    rows = math.ceil(panels / columns)
    figure = new_figure(figsize=(width, 0.9 + height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for unused in grid[panels:]:
        unused.remove()
    return figure, grid[:panels]


def _one_scale(axes: Sequence[Any], along: str, values: Sequence[float]) -> None:
    """Give all panels one scale: from zero, and logarithmic beyond its smallest value if values span over a decade."""
    sizes = [abs(value) for value in values if value]
    signed = min(values, default=0) < 0
    top = 1.05 * max(sizes, default=1.0)
    scale: dict[str, Any] = {"value": "linear"}
    ticks = None if sizes else [0.0]
    if sizes and max(sizes) / min(sizes) >= 10:
        low, high = math.floor(math.log10(min(sizes))), math.ceil(math.log10(max(sizes)))
        around_zero = max(0.4, 0.15 * (high - low))  # decades, as long as the part from zero to the smallest value
        top = 10.0**high
        ticks = _ticks(low, high, around_zero, signed)
        scale = {"value": "symlog", "linthresh": 10.0**low, "linscale": around_zero}
    for axis in axes:
        getattr(axis, f"set_{along}scale")(**scale)
        getattr(axis, f"set_{along}lim")(-top if signed else 0, top)
        if ticks is not None:
            getattr(axis, f"set_{along}ticks")(ticks)
        elif along == "x":
            axis.locator_params(axis="x", nbins=4)
        axis.minorticks_off()
        axis.tick_params(axis=along, labelsize=_TEXT)
        axis.grid(axis=along, linewidth=0.4, alpha=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)


def _ticks(low: int, high: int, around_zero: float, signed: bool) -> list[float]:
    """Return zero and powers of ten from `low` to `high`, so few that their labels stay apart."""
    room = _APART * (2 if signed else 1) * (around_zero + high - low)  # decades that a label takes
    decades = range(high, low - 1, -math.ceil(room))
    positive = [10.0**decade for decade in decades if around_zero + decade - low >= room][::-1]
    return [*([-tick for tick in positive[::-1]] if signed else []), 0.0, *positive]


def _finished(figure: "Figure", axes: list[Any], groups: Groups, title: str) -> "Figure":
    """Add the legend and the title, neither of them wider than the figure."""
    width = figure.get_size_inches()[0] * _INCH
    if len(groups) > 1:
        handles, _ = axes[0].get_legend_handles_labels()
        labels = told_apart(list(groups), 0.85 * width, _TEXT)
        columns = max(1, int(0.95 * width / (max(width_of(label, _TEXT) for label in labels) + 5 * _TEXT)))
        figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), frameon=False,
                      fontsize=_TEXT)  # fmt: skip
    if title:
        figure.suptitle(fitted(title, 0.95 * width, 11), fontsize=11)
    return figure
