"""A matplotlib figure that shows itself on the last line of a notebook's cell. Imported when something is drawn."""

import io

from matplotlib.figure import Figure
from PIL import Image

from ..display import png


class NotebookFigure(Figure):
    """A figure that needs no pyplot to be seen, and no window."""

    def _repr_png_(self) -> bytes:
        return png(Image.open(io.BytesIO(picture(self, 80))))


def picture(figure: Figure, dpi: int) -> bytes:
    """Return a figure as PNG, on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
