"""Pictures of graphs with the edges of one derivative highlighted. Takes names and numbers; never sees a model."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .labels import drawn, fitted, wrapped
from .placing import Points, bent, middle, place, straight
from .plots import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Edge = tuple[str, str]
Place = tuple[float, float]  # in inches
Places = dict[str, Place]  # of nodes
Ways = dict[Edge, tuple[float, Points]]  # the bend and the points of edges
CARRYING, OWN, FAINT, INK = "#D55E00", "#0072B2", "#B4B4BC", "#18181B"
GREY = "#5A5A62"
MAX_LABELLED_EDGES = 24  # with more highlighted edges, no partials are written beside them
_LEGEND = "orange: what the gradient passes on its way back from E; blue: where the quantity itself comes in"
_LEFT_OUT = f"; of more than {MAX_LABELLED_EDGES} edges no partials are written"
_SMALL, _MATH = 8, 12  # points
_PAD = 0.12  # of a label's size, around it
_NARROWEST = 4.0  # inches
_ATTEMPTS, _FOR_BEAUTY = 12, 4  # enlargements by a fifth to keep labels apart; of them, to keep them off other edges
_RADIUS = 0.24  # inches, of a node with its frame
_HIGHEST = 150  # inches
_DECADES = 2  # if norms span more, line width follows their logarithm


def draw_network(
    edges: Sequence[Edge],
    carrying: Collection[Edge],
    title: str = "",
    *,
    own_edges: Collection[Edge],
    own_nodes: Collection[str],
    labels: Mapping[str, str],
    partials: Mapping[Edge, str],
) -> "Figure":
    """Draw a network of neurons from left to right, inputs as squares, and highlight the edges of a derivative.

    Args:
        edges: (source, reader).
        carrying: the edges that carry the derivative back from E.
        title: at the top; $...$ is LaTeX.
        own_edges: the edges of the quantity itself: of a weight its edge, of an input the edges from it.
        own_nodes: the node of the quantity itself, if it is a neuron, a bias or an input.
        labels: of nodes, in LaTeX.
        partials: of edges, in LaTeX; omitted if there are many.

    Raises:
        FrameworkError: matplotlib is missing.
    """
    coloured = [edge for edge in edges if edge in own_edges or edge in carrying]
    named = [edge for edge in coloured if edge in partials] if len(coloured) <= MAX_LABELLED_EDGES else []
    written = {edge: f"${partials[edge]}$" for edge in named}
    places, ways, middles = _arranged(_layout(edges), edges, written)
    on_the_way = {node for edge in carrying for node in edge} | set(own_nodes)
    legend = _LEGEND + (_LEFT_OUT if partials and not named else "") if on_the_way else ""
    figure, axis = _canvas(places, ways, title, legend)
    for node, (x, y) in places.items():
        colour = OWN if node in own_nodes else CARRYING if node in on_the_way else INK
        box = "square,pad=0.45" if node[0] == "x" else "circle,pad=0.35"
        style = {"boxstyle": box, "facecolor": "white", "edgecolor": colour, "linewidth": 1.2 + 0.9 * (colour != INK)}
        axis.text(x, y, f"${labels[node]}$", ha="center", va="center", fontsize=_MATH, color=INK, bbox=style, zorder=3)
    around_labels = _with_holes(axis, middles, list(map(_size, written.values())))
    for (a, b), (bend, _) in ways.items():
        colour = OWN if (a, b) in own_edges else CARRYING if (a, b) in carrying else FAINT
        _arrow(axis, places[a], places[b], bend, colour).set_clip_path(around_labels, axis.transData)
    for (edge, label), at in zip(written.items(), middles, strict=True):
        colour = OWN if edge in own_edges else CARRYING
        axis.text(*at, label, ha="center", va="center", fontsize=_MATH, color=colour, zorder=2.5)
    return figure


def draw_blocks(
    names: Sequence[str], norms: Mapping[Edge, float], carrying: Collection[Edge], title: str = ""
) -> "Figure":
    """Draw blocks from top to bottom, with line width for the norm on each edge; edges that skip bend to the right.

    Args:
        names: in order of execution.
        norms: ℓ2 norm of the gradient on each edge (source, reader).
        carrying: the edges that carry the derivative.
        title: as in `draw_network`.

    Raises:
        FrameworkError: matplotlib is missing.
    """
    y_of = {name: -i for i, name in enumerate(names)}
    spans = [y_of[a] - y_of[b] for a, b in norms]
    reach = max([_bend(span) for span in spans], default=0.0)
    longest_name = max(len(name) for name in names)
    row = 0.3 if len(names) <= 120 else 0.17
    left = 0.4 + 0.13 * longest_name
    right = max(reach + 1.1, 7.5 - left)
    figure, axis = _figure(title, 0.62 * (left + right), 1.3 + row * len(names))
    width, scale = _width_scale(list(norms.values()))
    numbered = len(norms) <= 2 * len(names)
    for (source, reader), norm in sorted(norms.items(), key=lambda item: item[0] in carrying):
        colour = CARRYING if (source, reader) in carrying else FAINT
        _curve(axis, y_of[source], y_of[reader], colour, width(norm), f"{norm:.2g}" if numbered else "")
    for name, y in y_of.items():
        colour = CARRYING if any(name in edge for edge in carrying) else INK
        axis.plot([0], [y], "o", markersize=5, color=colour, zorder=3)
        axis.text(-0.25, y, drawn(name), ha="right", va="center", fontsize=8 if row > 0.2 else 5, color=INK)
    axis.set_xlim(-left, right)
    axis.set_ylim(-len(names) + 0.3, 0.7)
    axis.text(0, 0, scale, transform=axis.transAxes, fontsize=8, color=GREY, va="top")
    return figure


def _layout(edges: Sequence[Edge]) -> dict[str, tuple[int, float]]:
    """Return a column and a height for each node: columns by the longest path to it, heights by neighbours."""
    nodes = list(dict.fromkeys(node for edge in edges for node in edge))
    column = dict.fromkeys(nodes, 0)
    for _ in nodes:
        pushed = [(b, column[a] + 1) for a, b in edges if column[b] <= column[a]]
        if not pushed:
            break
        for node, minimum in pushed:
            column[node] = max(column[node], minimum)
    read_by = {node: [b for a, b in edges if a == node] for node in nodes}
    for node in nodes:
        if node[0] == "x" and read_by[node]:
            column[node] = min(column[reader] for reader in read_by[node]) - 1
    ranks = [[node for node in nodes if column[node] == i] for i in range(max(column.values()) + 1)]
    height = {node: _spread(i, len(rank)) for rank in ranks for i, node in enumerate(rank)}
    neighbours = {node: [a for a, b in edges if b == node] + read_by[node] for node in nodes}
    for sweep in range(8):
        for rank in ranks if sweep % 2 == 0 else ranks[::-1]:
            mean_height = {node: sum(height[n] for n in neighbours[node]) / len(neighbours[node]) for node in rank}
            rank.sort(key=lambda node: (-mean_height[node], nodes.index(node)))
            height.update({node: _spread(i, len(rank)) for i, node in enumerate(rank)})
    return {node: (column[node], height[node]) for node in nodes}


def _spread(index: int, count: int) -> float:
    return (count - 1) / 2 - index


def _arranged(
    layout: Mapping[str, tuple[int, float]], edges: Sequence[Edge], written: Mapping[Edge, str]
) -> tuple[Places, Ways, list[Place]]:
    """Return nodes, edges and the middles of labels, in inches: so far apart that no label covers another or a node.

    If it does not take much more room, no label lies on another edge either.
    """
    rows = 1 + max(abs(height) for _, height in layout.values()) * 2
    sizes = [_size(label) for label in written.values()]
    best: tuple[Places, Ways, list[Place], float] | None = None
    for attempt in range(_ATTEMPTS):
        column_width, row_height = 1.75 * 1.2**attempt, min(1.05 * 1.2**attempt, _HIGHEST / rows)
        places = {node: (column_width * x, row_height * y) for node, (x, y) in layout.items()}
        nodes = np.array([[x - _RADIUS, y - _RADIUS, x + _RADIUS, y + _RADIUS] for x, y in places.values()])
        ways = {}
        for a, b in edges:
            skips = layout[b][0] - layout[a][0] > 1
            ways[a, b] = (bent if skips else straight)(places[a], places[b], nodes)
        others = [points for edge, (_, points) in ways.items() if edge not in written]
        placed = place([ways[edge][1] for edge in written], sizes, nodes, others)
        if placed and (best is None or placed[1] < best[3]):
            best = places, ways, *placed
        if best and (best[3] == 0 or attempt >= _FOR_BEAUTY):
            return best[:3]
    return places, ways, [middle(ways[edge][1]) for edge in written]


def _canvas(places: Places, ways: Ways, title: str, legend: str) -> "tuple[Figure, Any]":
    """Return a figure and its axis in inches, with the title above and the legend below all that is drawn in it."""
    corners = np.concatenate([np.array(list(places.values())), *(points for _, points in ways.values())])
    (left, bottom), (right, top) = corners.min(0) - 0.45, corners.max(0) + 0.45
    wider = max(_NARROWEST - (right - left), 0) / 2
    left, right = left - wider, right + wider
    legend = wrapped(legend, 72 * (right - left - 0.3), _SMALL)
    bottom -= 0.2 + 0.16 * (1 + legend.count("\n"))
    heading = 0.55 if title else 0.0
    figure = new_figure(figsize=(right - left, top - bottom + heading))
    axis = figure.add_axes((0, 0, 1, (top - bottom) / (top - bottom + heading)))
    axis.set_axis_off()
    axis.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[])
    size = 18 if "$" in title else 12
    axis.set_title(title if "$" in title else fitted(title, 72 * (right - left - 0.3), size), fontsize=size)
    axis.text(left + 0.15, bottom + 0.12, legend, fontsize=_SMALL, color=GREY, va="bottom")
    return figure, axis


def _with_holes(axis: Any, middles: Sequence[Place], sizes: Sequence[Place]) -> Any:
    """Return the path around an axis less the boxes of labels: edges are interrupted there, on any ground."""
    from matplotlib.path import Path

    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    rings = [[(left, bottom), (right, bottom), (right, top), (left, top)]]
    for (x, y), (width, height) in zip(middles, sizes, strict=True):
        w, h = width / 2, height / 2
        rings.append([(x - w, y - h), (x - w, y + h), (x + w, y + h), (x + w, y - h)])  # the other way round: a hole
    return Path.make_compound_path(*(Path([*ring, ring[0]], closed=True) for ring in rings))


def _size(label: str) -> Place:
    """Return the width and height of a formula with some room around it, in inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    width, height, _ = text_to_path.get_text_width_height_descent(label, FontProperties(size=_MATH), ismath=True)
    return width / 72 + 2 * _PAD * _MATH / 72, height / 72 + 2 * _PAD * _MATH / 72


def _arrow(axis: Any, start: Place, end: Place, bend: float, colour: str) -> Any:
    from matplotlib.patches import FancyArrowPatch

    arrow = FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=11, linewidth=1.2 if colour == FAINT else 2.4, color=colour,
        shrinkA=17, shrinkB=18, connectionstyle=f"arc3,rad={bend}", zorder=1 + (colour != FAINT),
    )  # fmt: skip
    return axis.add_patch(arrow)


def _bend(span: int) -> float:
    return 0.0 if span <= 1 else 0.75 * span**0.6


def _curve(axis: Any, start: int, end: int, colour: str, width: float, label: str) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    reach = _bend(start - end)
    curve = Curve([(0, start), (4 / 3 * reach, start), (4 / 3 * reach, end), (0, end)], [1, 4, 4, 4])
    line = PathPatch(curve, fill=False, color=colour, linewidth=width, capstyle="butt", zorder=1 + (colour != FAINT))
    axis.add_patch(line)
    if label:
        axis.text(reach + 0.14, (start + end) / 2, label, fontsize=6.5, va="center", color=GREY, zorder=4)


def _width_scale(norms: Sequence[float]) -> tuple[Any, str]:
    """Return a function from norms to line widths in points, and its description for the legend."""
    positive = [norm for norm in norms if norm > 0 and math.isfinite(norm)]
    if not positive:
        return lambda norm: 0.5, "line width: ℓ2 norm of the gradient carried; all are 0"
    low, high = min(positive), max(positive)
    label = f"ℓ2 norm of the gradient carried, {low:.2g} to {high:.2g}"
    if high / low < 10**_DECADES:
        return lambda norm: 0.5 + 6 * norm / high, f"line width: {label}"
    span = math.log(high / low)
    return (
        lambda norm: 0.5 + (6 * math.log(norm / low) / span if norm > 0 else 0),
        f"line width: logarithm of the {label}",
    )


def _figure(title: str, width: float, height: float) -> "tuple[Figure, Any]":
    figure = new_figure(figsize=(width, height), layout="constrained")
    axis = figure.subplots()
    axis.set_axis_off()
    axis.set(xticks=[], yticks=[])
    if title:
        axis.set_title(title, fontsize=18 if "$" in title else 12)
    return figure, axis
