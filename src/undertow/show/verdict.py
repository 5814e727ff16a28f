"""A verdict as one picture: the photograph, its map, the six answers, and curves for three of them."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import heatmap
from .labels import drawn
from .plots import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVELS = {"yes": "#009E73", "weak": "#E69F00", "no": "#D55E00"}
QUESTIONS = {
    "class": "depends on the class",
    "weights": "depends on the trained weights",
    "input": "is more than edges",
    "faithfulness": "marks the pixels that carry the score",
    "stability": "stays the same under small noise",
    "convergence": "keeps directions distinct",
}
FAINT = "#5A5A62"


def figure(photograph: heatmap.Pixels | None, values: heatmap.Map, verdict: Mapping[str, Any]) -> "Figure":
    """Draw a verdict.

    Args:
        photograph: `(H, W, 3)` uint8, the network's input; None is left out.
        values: the judged map, `(C, H, W)`.
        verdict: as plain data, as its JSON file holds it.

    Raises:
        FrameworkError: matplotlib is missing.
    """
    figure = new_figure(figsize=(13.5, 8.2))
    title = f"{verdict['target_name']}: {verdict['rule']}, {verdict['estimator']}"
    figure.text(0.03, 0.965, drawn(title), fontsize=10, color=FAINT, va="center")
    figure.text(
        0.03, 0.945, "\n".join(map(drawn, textwrap.wrap(_plain(verdict["sentence"]), 125))), fontsize=12, va="top"
    )
    grid = figure.add_gridspec(2, 12, left=0.05, right=0.985, top=0.86, bottom=0.14, hspace=0.25, wspace=1.4)
    for i, (name, pixels) in enumerate({"photograph": photograph, "map": heatmap.draw(values, "magnitude")}.items()):
        if pixels is None:
            continue
        axis = figure.add_subplot(grid[0, 3 * i : 3 * i + 3])
        axis.imshow(np.asarray(pixels))
        axis.set_title(name, fontsize=10, color=FAINT)
        axis.axis("off")
    _answers(figure.add_subplot(grid[0, 6:]), verdict)
    curves = {"weights": _weights, "faithfulness": _faithfulness, "convergence": _convergence}
    for i, (question, draw) in enumerate(curves.items()):
        axis = figure.add_subplot(grid[1, 4 * i : 4 * i + 4])
        if question in verdict["answers"]:
            draw(axis, verdict["answers"][question]["numbers"])
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", linewidth=0.4, alpha=0.6)
        else:
            axis.axis("off")
    return figure


def _answers(axis: Any, verdict: Mapping[str, Any]) -> None:
    """List the six answers; the level is written as text, not only as a colour."""
    axis.axis("off")
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    for i, (question, label) in enumerate(QUESTIONS.items()):
        top = 1 - (i + 0.1) / len(QUESTIONS)
        answer = verdict["answers"].get(question)
        text = _plain(answer["sentence"]) if answer else f"not asked: {verdict['unanswered'].get(question, '')}"
        level = answer["level"] if answer else "-"
        axis.text(0.0, top, level, color="white" if answer else FAINT, va="top", fontsize=9, weight="bold",
                  bbox={"boxstyle": "round,pad=0.3", "color": LEVELS.get(level, "white")})  # fmt: skip
        axis.text(0.085, top, label, va="top", fontsize=10)
        axis.text(
            0.085, top - 0.06, "\n".join(map(drawn, textwrap.wrap(text, 84)[:2])), va="top", fontsize=8, color=FAINT
        )


def _weights(axis: Any, numbers: Mapping[str, Any]) -> None:
    layers = numbers["layers"]
    for rows, count, label, style in (
        (numbers["cascade"], "reinitialized", "from the top down", "-o"),
        (numbers["single"], "from_top", "this layer alone", ":s"),
    ):
        axis.plot([row[count] for row in rows], [row["spearman"] for row in rows], style, markersize=4, label=label)
    _marks(axis, numbers["null"]["spearman"])
    axis.set_xscale("log")
    ticks = [row["reinitialized"] for row in numbers["cascade"]]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(min(-0.1, *axis.get_ylim()), 1.05)
    axis.set_title("weights re-initialised: similarity to the map", fontsize=10)
    axis.set_xlabel(f"layers counted from the top, of {layers}", fontsize=9)
    axis.legend(fontsize=8, frameon=False)


def _faithfulness(axis: Any, numbers: Mapping[str, Any]) -> None:
    curves = numbers["replacements"]["blur"]
    colours = {"map": "#0072B2", "edges": "#CC79A7", "random": FAINT}
    for order, curve in curves.items():
        shares = np.linspace(0, 100, len(curve["deletion"]))
        axis.plot(shares, curve["insertion"], color=colours[order], label=f"{order}, inserted")
        axis.plot(shares, curve["deletion"], color=colours[order], linestyle="--", label=f"{order}, deleted")
    axis.set_title("score as the strongest pixels are inserted or deleted (blur)", fontsize=10)
    axis.set_xlabel("% of the pixels, strongest first", fontsize=9)
    axis.set_ylabel("0: all blurred, 1: none", fontsize=9, labelpad=0)
    axis.legend(fontsize=7, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.17))


def _convergence(axis: Any, numbers: Mapping[str, Any]) -> None:
    rows: Sequence[Mapping[str, Any]] = numbers["depths"]
    axis.plot(range(len(rows)), [row["cosine"] for row in rows], "-o", markersize=4, color="#0072B2")
    _marks(axis, numbers["null"])
    axis.set_xticks(range(len(rows)), [row["layer"].rpartition(".")[2] for row in rows], rotation=30, ha="right")
    axis.tick_params(axis="x", labelsize=7)
    axis.set_ylim(min(-0.25, *axis.get_ylim()), 1.05)
    axis.set_title("random directions propagated backward: mean cosine", fontsize=10)


def _marks(axis: Any, marks: Mapping[str, float]) -> None:
    """Mark the levels of random maps: unrelated below one line, mostly the same above the other."""
    axis.axhline(marks["half"], color=LEVELS["no"], linewidth=0.8, linestyle="--")
    axis.axhline(marks["unrelated"], color=LEVELS["yes"], linewidth=0.8, linestyle="--")
    for key, text, align in (("half", "mostly the same", "bottom"), ("unrelated", "unrelated", "top")):
        axis.text(0.99, marks[key], text, fontsize=7, color=FAINT, ha="right", va=align,
                  transform=axis.get_yaxis_transform())  # fmt: skip


def _plain(sentence: str) -> str:
    """Return a sentence without the asterisks that mark italics."""
    return sentence.replace("*", "")
