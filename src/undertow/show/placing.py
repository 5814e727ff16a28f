"""Where to write beside the edges of a drawn graph, so that no label covers another, or a node."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]  # (n, 2)
Boxes = npt.NDArray[np.float64]  # (n, 4): left, bottom, right, top

SAMPLES = 81  # points of an edge
_ENDS = 8  # of them at each end, where no label is written
_BENDS = (0.18, -0.18, 0.3, -0.3, 0.45, -0.45)
_SWEEPS = 3
_FROM_MIDDLE = 0.02  # what a step from the middle costs; to lie on another edge costs 1


def curve(start: tuple[float, float], end: tuple[float, float], bend: float) -> Points:
    """Return points of the edge that matplotlib draws as `arc3` with `rad=bend`, in units alike in x and y.

    >>> curve((0.0, 0.0), (2.0, 0.0), 0.5)[40].tolist()
    [1.0, -0.5]
    """
    a, b = np.array(start), np.array(end)
    across = np.array([b[1] - a[1], a[0] - b[0]])
    control = (a + b) / 2 + bend * across
    t = np.linspace(0, 1, SAMPLES)[:, None]
    points: Points = (1 - t) ** 2 * a + 2 * t * (1 - t) * control + t**2 * b
    return points


def place(
    labelled: Sequence[Points], sizes: Sequence[tuple[float, float]], nodes: Boxes, others: Sequence[Points]
) -> tuple[list[tuple[float, float]], int] | None:
    """Return the middle of each label, on its own edge, and how many other edges they cover.

    None where a label would cover another one or a node. Labels keep off other edges and in the middles of their own
    ones where they can.

    Args:
        labelled: the edges with a label, as `curve` returns them.
        sizes: width and height of each label.
        nodes: what no label may cover.
        others: the edges without a label.
    """
    candidates = [points[_ENDS:-_ENDS] for points in labelled]
    boxes = [_boxes(points, size) for points, size in zip(candidates, sizes, strict=True)]
    costs, crossings = [], []
    for i, own in enumerate(boxes):
        lines = [*labelled[:i], *labelled[i + 1 :], *others]
        crossed = sum((_hit(own, line) for line in lines), np.zeros(len(own)))
        steps = np.abs(np.arange(len(own)) - len(own) // 2)
        crossings.append(crossed)
        costs.append(crossed + _FROM_MIDDLE * steps + np.where(_overlaps(own, nodes).any(1), np.inf, 0))
    chosen: list[Boxes] = [np.empty((0, 4))] * len(boxes)
    positions = [0] * len(boxes)
    for _ in range(_SWEEPS):
        for i, own in enumerate(boxes):
            taken = np.concatenate([box for j, box in enumerate(chosen) if j != i] or [np.empty((0, 4))])
            cost = np.where(_overlaps(own, taken).any(1), np.inf, costs[i])
            positions[i] = int(np.argmin(cost))
            if not np.isfinite(cost[positions[i]]):
                return None
            chosen[i] = own[positions[i]][None]
    middles = [(float(points[k][0]), float(points[k][1])) for points, k in zip(candidates, positions, strict=True)]
    return middles, int(sum(crossed[k] for crossed, k in zip(crossings, positions, strict=True)))


def straight(start: tuple[float, float], end: tuple[float, float], _: Boxes) -> tuple[float, Points]:
    """Return no bend, and the points of an edge."""
    return 0.0, curve(start, end, 0.0)


def middle(points: Points) -> tuple[float, float]:
    """Return the middle of an edge."""
    return float(points[SAMPLES // 2, 0]), float(points[SAMPLES // 2, 1])


def bent(start: tuple[float, float], end: tuple[float, float], nodes: Boxes) -> tuple[float, Points]:
    """Return a bend for an edge that skips a column, and its points: the first of a few that covers fewest nodes."""
    ways = [(bend, curve(start, end, bend)) for bend in _BENDS]
    inner = [points[_ENDS:-_ENDS] for _, points in ways]
    hits = [int(_hit(nodes, points).sum()) for points in inner]
    return ways[hits.index(min(hits))]


def _boxes(points: Points, size: tuple[float, float]) -> Boxes:
    half = np.array(size) / 2
    return np.hstack([points - half, points + half])


def _overlaps(a: Boxes, b: Boxes) -> npt.NDArray[np.bool_]:
    """Return which boxes of `a`, `(n,)`, overlap which of `b`, `(m,)`: `(n, m)`."""
    a, b = a[:, None], b[None]
    return np.asarray(((a[..., :2] < b[..., 2:]) & (b[..., :2] < a[..., 2:])).all(-1))


def _hit(boxes: Boxes, line: Points) -> npt.NDArray[np.bool_]:
    """Return in which boxes, `(n,)`, a point of a line lies."""
    inside = (line[None] > boxes[:, None, :2]) & (line[None] < boxes[:, None, 2:])
    return np.asarray(inside.all(-1).any(-1))
