"""What is wrong with a figure's layout, by matplotlib's own boxes: texts on texts, on lines, or outside the frame."""

from itertools import combinations

from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

SLACK = 1.0  # pixels that boxes may share: letters do not fill them


def shown_texts(figure: Figure) -> list[Text]:
    """All texts that are drawn; matplotlib also keeps ticks that lie outside the view."""
    out_of_view = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                if not low <= tick.get_loc() <= high:
                    out_of_view |= {id(tick.label1), id(tick.label2)}
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    return [text for text in {id(t): t for t in texts}.values() if id(text) not in out_of_view]


def faults(figure: Figure, *, lines: bool = True) -> list[str]:
    """Draw the figure and return a sentence for each fault."""
    figure.canvas.draw()
    boxes = [(text.get_text(), _inner(text.get_window_extent())) for text in shown_texts(figure)]
    frame = figure.bbox
    sentences = [
        f"{name!r} leaves the frame"
        for name, box in boxes
        if box.x0 < frame.x0 or box.y0 < frame.y0 or box.x1 > frame.x1 or box.y1 > frame.y1
    ]
    sentences += [f"{a!r} covers {b!r}" for (a, p), (b, q) in combinations(boxes, 2) if p.overlaps(q)]
    if lines:
        sentences += [
            f"{name!r} lies on a line"
            for name, box in boxes
            for path in _lines(figure)
            if path.intersects_bbox(box, False)
        ]
    return sentences


def _inner(box: Bbox) -> Bbox:
    return Bbox.from_extents(box.x0 + SLACK, box.y0 + SLACK, box.x1 - SLACK, box.y1 - SLACK)


def _lines(figure: Figure) -> list:
    """Curves, bars and arrows, in pixels; no grids, no axes."""
    drawn = [line for axes in figure.axes for line in axes.lines if len(line.get_xdata()) > 1]
    drawn += [patch for axes in figure.axes for patch in axes.patches]
    return [artist.get_transform().transform_path(artist.get_path()) for artist in drawn]
