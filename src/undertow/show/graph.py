"""Pictures of graphs with the edges of one derivative highlighted. Takes names and numbers; never sees a model."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .labels import drawn
from .plots import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Edge = tuple[str, str]
CARRYING, OWN, FAINT, INK = "#D55E00", "#0072B2", "#B4B4BC", "#18181B"
GREY = "#5A5A62"
MAX_LABELLED_EDGES = 24  # with more highlighted edges, no partials are written beside them
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
    positions = _layout(edges)
    columns = 1 + max(x for x, _ in positions.values())
    rows = 1 + max(abs(y) for _, y in positions.values()) * 2
    figure, axis = _figure(title, 1.75 * columns + 0.4, min(1.05 * rows + 0.9, 40))
    for edge in edges:
        colour = OWN if edge in own_edges else CARRYING if edge in carrying else FAINT
        _arrow(axis, positions[edge[0]], positions[edge[1]], colour, 1.2 if colour == FAINT else 2.4)
        if colour != FAINT and len(carrying) + len(own_edges) <= MAX_LABELLED_EDGES and edge in partials:
            _label_edge(axis, positions[edge[0]], positions[edge[1]], f"${partials[edge]}$", colour)
    carrying_nodes = {node for edge in carrying for node in edge} | set(own_nodes)
    for node, (x, y) in positions.items():
        colour = OWN if node in own_nodes else CARRYING if node in carrying_nodes else INK
        box = "square,pad=0.45" if node[0] == "x" else "circle,pad=0.35"
        style = {"boxstyle": box, "facecolor": "white", "edgecolor": colour, "linewidth": 1.2 + 0.9 * (colour != INK)}
        axis.text(x, y, f"${labels[node]}$", ha="center", va="center", fontsize=12, color=INK, bbox=style, zorder=3)
    axis.set_xlim(-0.45, columns - 0.55)
    axis.set_ylim(-rows / 2 - 0.15, rows / 2)
    if carrying_nodes:
        label = "orange: what the gradient passes on its way back from E; blue: where the quantity itself comes in"
        axis.text(0, 0, label, transform=axis.transAxes, fontsize=8, color=GREY)
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


def _arrow(axis: Any, start: tuple[int, float], end: tuple[int, float], colour: str, width: float) -> None:
    from matplotlib.patches import FancyArrowPatch

    bend = 0.18 if end[0] - start[0] > 1 else 0.0
    arrow = FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=11, linewidth=width, color=colour, shrinkA=17, shrinkB=18,
        connectionstyle=f"arc3,rad={bend}", zorder=1 + (colour != FAINT),
    )  # fmt: skip
    axis.add_patch(arrow)


def _label_edge(axis: Any, start: tuple[int, float], end: tuple[int, float], label: str, colour: str) -> None:
    """Write in the middle of an edge, or below the middle if the edge bends."""
    drop = 0.09 * math.dist(start, end) if end[0] - start[0] > 1 else 0.0
    x, y = 0.55 * start[0] + 0.45 * end[0], 0.55 * start[1] + 0.45 * end[1] - drop
    paper = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.9}
    axis.text(x, y, label, ha="center", va="center", fontsize=12, color=colour, bbox=paper, zorder=2.5)


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
    if title:
        axis.set_title(title, fontsize=18 if "$" in title else 12)
    return figure, axis
