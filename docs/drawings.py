"""Draw the pictures of docs/concepts.md; a test holds them to what this prints.

    python docs/drawings.py

Their greys and colours can be read on white and on black, for a site has both.
"""

from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parent / "concepts"
GREY, TEAL, RED, VIOLET = "#767676", "#0a857a", "#c2502e", "#7b61c9"
MONO, SANS = "ui-monospace, Menlo, Consolas, monospace", "system-ui, Helvetica, Arial, sans-serif"


class Drawing:
    """Elements of one SVG."""

    def __init__(self, height: int, what: str) -> None:
        self.height, self.what = height, what
        self.elements: list[str] = []

    def text(self, x: float, y: float, words: str, colour: str = GREY, size: int = 14, anchor: str = "middle",
             font: str = SANS, weight: str = "normal") -> None:  # fmt: skip
        self.elements.append(
            f'<text x="{x:g}" y="{y:g}" fill="{colour}" font-size="{size}" text-anchor="{anchor}" '
            f'font-family="{font}" font-weight="{weight}">{escape(words)}</text>'
        )

    def box(self, x: float, y: float, width: float, words: str, colour: str = GREY, filled: bool = False,
            height: float = 34) -> None:  # fmt: skip
        fill = colour if filled else "none"
        self.elements.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" fill="{fill}" '
            f'stroke="{colour}" stroke-width="1.5"/>'
        )
        self.text(x + width / 2, y + height / 2 + 5, words, "#ffffff" if filled else colour, font=MONO)

    def arrow(self, x1: float, y1: float, x2: float, y2: float, colour: str = GREY) -> None:
        self.elements.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}" stroke-width="1.8" '
            f'marker-end="url(#{colour[1:]})"/>'
        )

    def dot(self, x: float, y: float, colour: str = TEAL, radius: float = 6) -> None:
        self.elements.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{colour}"/>')

    def bar(self, x: float, y: float, width: float, colour: str, words: str = "") -> None:
        self.elements.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="24" fill="{colour}"/>')
        if words:
            self.text(x + width / 2, y + 17, words, "#ffffff", 13)

    def svg(self) -> str:
        heads = "".join(
            f'<marker id="{colour[1:]}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="{colour}"/></marker>'
            for colour in (GREY, TEAL, RED, VIOLET)
        )
        parts = "\n".join(self.elements)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {self.height}" width="720" '
            f'height="{self.height}" role="img">\n<title>{escape(self.what)}</title>\n<defs>{heads}</defs>\n'
            f"{parts}\n</svg>\n"
        )


def rule() -> Drawing:
    """One ReLU: the numbers that went in, the gradient that arrives, and what three rules hand on."""
    d = Drawing(300, "What a gradient becomes at one ReLU under three rules")
    forward, arriving = (3, -1, 2, -4), (-2, 5, 1, 3)
    rows = [
        ("went in: x", forward, GREY),
        ("arrives: g", arriving, VIOLET),
        ("gradient: local(g)", [g if x > 0 else 0 for x, g in zip(forward, arriving, strict=True)], TEAL),
        ("deconvnet: relu(g)", [max(g, 0) for g in arriving], TEAL),
        ("guided: local(relu(g))", [max(g, 0) if x > 0 else 0 for x, g in zip(forward, arriving, strict=True)], TEAL),
    ]
    for i, (label, numbers, colour) in enumerate(rows):
        y = 20 + i * 48 + (24 if i > 1 else 0)
        d.text(290, y + 22, label, colour, 15, "end", MONO)
        for j, number in enumerate(numbers):
            d.box(310 + 62 * j, y, 54, str(number).replace("-", "−"), colour, filled=i > 1 and number != 0)
    d.text(590, 42, "x < 0: it is shut", GREY, 12, "start")
    d.arrow(586, 38, 562, 38)
    d.arrow(432, 108, 432, 134, VIOLET)
    d.text(446, 128, "back through this one activation", VIOLET, 12, "start")
    return d


def site() -> Drawing:
    """A network in which one module is called twice, with a site marked."""
    d = Drawing(210, "A site: a module's name, the number of the call, and the direction")
    names = ["conv1", "relu", "conv2", "relu", "fc"]
    calls = ["call 0", "call 0", "call 0", "call 1", "call 0"]
    for i, (name, call) in enumerate(zip(names, calls, strict=True)):
        x = 24 + 140 * i
        d.box(x, 84, 96, name, TEAL if i == 3 else GREY, filled=i == 3)
        d.text(x + 48, 138, call, TEAL if i == 3 else GREY, 13)
        if i < 4:
            d.arrow(x + 98, 94, x + 138, 94)
            d.arrow(x + 138, 108, x + 98, 108, VIOLET)
    d.text(24, 66, "forward: values", GREY, 13, "start")
    d.text(24, 172, "backward: gradients", VIOLET, 13, "start")
    d.dot(564, 108)
    d.arrow(564, 176, 564, 117, TEAL)
    d.text(690, 194, "the site relu, call 1, backward: the gradient at its output", TEAL, 13, "end")
    d.text(492, 66, "the same module, used again", TEAL, 13)
    return d


def measure() -> Drawing:
    """Batches become states, which merge to the state of all."""
    d = Drawing(230, "A measure: tensors become small states, and states merge")
    for i in range(2):
        y = 20 + 100 * i
        for k in (2, 1, 0):
            d.elements.append(
                f'<rect x="{24 + 8 * k}" y="{y + 8 * k}" width="92" height="54" rx="3" fill="none" '
                f'stroke="{VIOLET}" stroke-width="1.5"/>'
            )
        d.text(70, y + 32, f"batch {i}", VIOLET, 13)
        d.text(152, y + 84, "(B, C, H, W)", VIOLET, 12, "end", MONO)
        d.arrow(148, y + 34, 226, y + 34)
        d.text(188, y + 26, "reduce", GREY, 12)
        for j, high in enumerate(((8, 22, 40, 18, 6), (5, 30, 28, 24, 10))[i]):
            d.elements.append(
                f'<rect x="{236 + 18 * j}" y="{y + 56 - high}" width="15" height="{high}" fill="{TEAL}"/>'
            )
        d.text(281, y + 74, "a state", TEAL, 12)
    d.arrow(336, 54, 420, 96)
    d.arrow(336, 154, 420, 118)
    d.text(392, 62, "merge", GREY, 12)
    for j, high in enumerate((13, 52, 68, 42, 16)):
        d.elements.append(f'<rect x="{432 + 18 * j}" y="{142 - high}" width="15" height="{high}" fill="{TEAL}"/>')
    d.text(477, 162, "the state of both, to the bit", TEAL, 12)
    d.arrow(536, 110, 604, 110)
    d.text(570, 102, "finish", GREY, 12)
    d.box(610, 93, 96, "a row", GREY)
    d.text(658, 146, "of Parquet", GREY, 12)
    return d


def finding() -> Drawing:
    """What a forward pass predicts, held to what the backward pass brings."""
    d = Drawing(250, "A finding: a prediction that came true names the cause")
    full = 440
    d.text(196, 47, "predicted of max-pooling", GREY, 13, "end")
    d.bar(210, 30, full * 0.75, GREY, "75.0 % of the gradient is zero")
    d.text(196, 87, "and of the ReLU before it", GREY, 13, "end")
    d.bar(210 + full * 0.75, 70, full * 0.229, RED, "22.9 %")
    d.text(196, 127, "observed at conv6", VIOLET, 13, "end")
    d.bar(210, 110, full * 0.979, VIOLET, "97.9 %")
    d.elements.append(
        f'<line x1="{210 + full * 0.979:g}" y1="66" x2="{210 + full * 0.979:g}" y2="140" stroke="{GREY}" '
        'stroke-dasharray="4 3"/>'
    )
    d.arrow(430, 144, 430, 172, TEAL)
    d.text(444, 162, "they agree, element by element", TEAL, 12, "start")
    d.box(
        60,
        180,
        600,
        "pooling at conv6, proved: cause, sentence, evidence, remedy, source",
        TEAL,
        filled=True,
        height=40,
    )
    return d


def verdict() -> Drawing:
    """A number of one's own map, on the scale that random maps make."""
    d = Drawing(240, "A verdict: each answer is read off random maps")
    d.text(24, 30, "How alike are the maps of two classes?", GREY, 15, "start", weight="bold")
    for x, width, colour, word in ((24, 190, TEAL, "yes"), (214, 190, GREY, "weak"), (404, 292, RED, "no")):
        d.bar(x, 90, width, colour, word)
    d.text(24, 134, "0", GREY, 12, "start")
    d.text(696, 134, "1: the same map", GREY, 12, "end")
    for x, words in (
        (214, ("as unrelated", "random maps are")),
        (404, ("as random maps are that", "share half their variance")),
    ):
        d.elements.append(f'<line x1="{x}" y1="82" x2="{x}" y2="146" stroke="{GREY}" stroke-width="1.5"/>')
        d.text(x, 164, words[0], GREY, 12)
        d.text(x, 180, words[1], GREY, 12)
    d.dot(690, 72, VIOLET)
    d.text(676, 66, "tabby instead of Egyptian cat: 1.00", VIOLET, 13, "end")
    d.text(24, 222, "“Yes” always speaks for the map. Six such questions make the verdict.", GREY, 13, "start")
    return d


DRAWINGS = {"rule": rule, "site": site, "measure": measure, "finding": finding, "verdict": verdict}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")
