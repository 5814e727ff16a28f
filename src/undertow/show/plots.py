"""Charts of quantiles, as `undertow.runs` returns them; nothing here sees a model or a run."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import FrameworkError, InputError, printable
from ..files import published
from .ground import on_ground

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


Groups = Mapping[str, Sequence[QuantileCurve]]

# Okabe and Ito's palette: distinguishable with any colour vision. Source: jfly.uni-koeln.de/color
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
UNITS = {
    ("magnitude", "backward"): "|gradient|, objective per unit of output",
    ("value", "backward"): "gradient, objective per unit of output",
    ("channel_norm", "backward"): "ℓ2 norm of a channel's gradient,\nobjective per unit of output",
    ("magnitude", "forward"): "|output|",
    ("value", "forward"): "output",
    ("channel_norm", "forward"): "ℓ2 norm of a channel's output",
}


def quantile_curves(groups: Groups, title: str = "") -> "Figure":
    """Draw quantile curves: a panel for each site, in it a curve for each group, with its median marked.

    Args:
        groups: for each label, such as a run's name, the quantiles of its sites, in order.
        title: at the top of the figure.

    Raises:
        InputError: nothing to draw.
        FrameworkError: matplotlib is missing.
    """
    n_sites = max((len(rows) for rows in groups.values()), default=0)
    figure, axes = _figure(n_sites, groups)
    for i, axis in enumerate(axes):
        shown = [(group, label, rows[i]) for group, (label, rows) in enumerate(groups.items()) if i < len(rows)]
        for group, label, row in shown:
            percents = [100 * q for q in row.q]
            colour = COLOURS[group % len(COLOURS)]
            axis.plot(percents, row.values, marker="o", markersize=3, color=colour, label=drawn(label))
            if 0.5 in row.q:
                median = row.values[row.q.index(0.5)]
                axis.plot([50], [median], marker="D", markersize=8, color=colour, markeredgecolor="white")
                axis.annotate(f"{median:.3g}", (50, median), (6, -12), textcoords="offset points", fontsize=8)
        axis.set_title(drawn(" / ".join(dict.fromkeys(row.label for _, _, row in shown))), fontsize=10)
        axis.set_xlabel("quantile, %")
        _scale(axis, [value for _, _, row in shown for value in row.values])
    axes[0].set_ylabel(_unit(groups))
    return _finished(figure, axes, groups, title)


def quantile_panels(groups: Groups, title: str = "") -> "Figure":
    """Draw one panel for each quantile, and in it one bar for each site and group, groups side by side.

    Args:
        groups: for each label the quantiles of its sites, in order, all of the same fractions.
        title: as in `quantile_curves`.

    Raises:
        InputError, FrameworkError: as in `quantile_curves`.
    """
    q = next((rows[0].q for rows in groups.values() if rows), ())
    figure, axes = _figure(len(q), groups)
    width = 0.8 / max(len(groups), 1)
    all_values = [row.values[row.q.index(fraction)] for rows in groups.values() for row in rows for fraction in q]
    for fraction, axis in zip(q, axes, strict=True):
        for i, (label, rows) in enumerate(groups.items()):
            values = [row.values[row.q.index(fraction)] for row in rows]
            x = [site + (i - (len(groups) - 1) / 2) * width for site in range(len(rows))]
            axis.bar(x, values, 0.92 * width, color=COLOURS[i % len(COLOURS)], label=drawn(label))
            for position, value in zip(x, values, strict=True):
                if value == 0:
                    axis.annotate("0", (position, 0), (0, 2), textcoords="offset points", ha="center", fontsize=8)
        longest = max(groups.values(), key=len)
        names = [
            " / ".join(dict.fromkeys(r[i].label for r in groups.values() if i < len(r))) for i in range(len(longest))
        ]
        axis.set_xticks(range(len(names)), list(map(drawn, names)), rotation=45, ha="right", fontsize=8)
        axis.set_title(f"{100 * fraction:g} % quantile", fontsize=10)
        _scale(axis, all_values)
    axes[0].set_ylabel(_unit(groups))
    return _finished(figure, axes, groups, title)


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
    try:
        from .figure import NotebookFigure
    except ImportError as error:
        raise FrameworkError('drawing needs matplotlib; run: pip install "undertow[plot]"') from error
    return NotebookFigure(**options)


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


def drawn(text: str) -> str:
    r"""Return a text as matplotlib draws it: with no formula between dollars, and in a legend whatever it begins with.

    >>> drawn("$x$")
    '\\$x\\$'
    """
    plain = printable(text).replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain


def check_ending(path: str | Path) -> Path:
    """Return the path of a chart.

    Raises:
        InputError: it does not end in .png, .svg or .pdf.
    """
    path = Path(path)
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"{path.name!r} must end in .png, .svg or .pdf")
    return path


def _figure(panels: int, groups: Groups) -> "tuple[Figure, list[Any]]":
    if not panels or not any(groups.values()):
        raise InputError("there are no quantiles to draw; was anything recorded?")
    columns = min(panels, 4)
    rows = math.ceil(panels / columns)
    figure = new_figure(figsize=(1.2 + 3.6 * columns, 0.8 + 3.4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for unused in grid[panels:]:
        unused.remove()
    return figure, grid[:panels]


def _scale(axis: Any, values: Sequence[float]) -> None:
    """Use a logarithmic scale if values span more than a decade, linear around zero so that zeros stay visible."""
    sizes = [abs(value) for value in values if value and math.isfinite(value)]
    axis.grid(axis="y", linewidth=0.4, alpha=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    if not sizes or max(sizes) / min(sizes) < 10:
        axis.set_ylim(bottom=min(0, *values) if len(values) > 1 else None)
        return
    axis.set_yscale("symlog", linthresh=10 ** math.floor(math.log10(min(sizes))), linscale=0.4)
    decades = range(math.floor(math.log10(min(sizes))), math.ceil(math.log10(max(sizes))) + 1)
    step = math.ceil(len(decades) / 8)
    ticks = [10.0**decade for decade in decades][::step]
    negative = [-tick for tick in ticks] if min(values) < 0 else []
    axis.set_yticks([*negative, 0, *ticks])
    axis.minorticks_off()


def _unit(groups: Groups) -> str:
    row = next(row for rows in groups.values() for row in rows)
    return UNITS.get((row.of, row.phase), f"{row.of}, {row.phase}")


def _finished(figure: "Figure", axes: list[Any], groups: Groups, title: str) -> "Figure":
    if len(groups) > 1:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    if title:
        figure.suptitle(drawn(title), fontsize=12)
    return figure
