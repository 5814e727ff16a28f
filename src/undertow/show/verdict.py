"""A verdict as one picture: the photograph, its map, the six answers, and curves for three of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import heatmap
from .labels import fitted, told_apart, wrapped
from .plots import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVELS = {"yes": "#009E73", "weak": "#E69F00", "no": "#D55E00"}
QUESTIONS = {
    "class": "depends on the class",
    "weights": "depends on the trained weights",
    "input": "is more than edges",
    "faithfulness": "marks the pixels that carry the score",
    "stability": "stays mostly itself under small noise",
    "convergence": "keeps directions distinct",
}
FAINT = "#5A5A62"
_WIDTH, _EDGE, _TILE, _BADGE, _BELOW = 13.5, 0.4, 2.75, 0.6, 4.1  # inches; the last of the curves and their legends


def figure(photograph: heatmap.Pixels | None, values: heatmap.Map, verdict: Mapping[str, Any]) -> "Figure":
    """Draw a verdict.

    Args:
        photograph: `(H, W, 3)` uint8, the network's input; None is left out.
        values: the judged map, `(C, H, W)`.
        verdict: as plain data, as its JSON file holds it.

    Raises:
        FrameworkError: matplotlib is missing.
    """
    title = f"{verdict['target_name']}: {verdict['rule']}, {verdict['estimator']}"
    sentence = wrapped(_plain(verdict["sentence"]), 72 * (_WIDTH - 2 * _EDGE), 12)
    answers = [_answer(verdict, question) for question in QUESTIONS]
    head = 0.65 + 0.2 * (1 + sentence.count("\n"))
    middle = max(_TILE + 0.35, sum(height for *_, height in answers))
    height = head + middle + _BELOW
    figure = new_figure(figsize=(_WIDTH, height))
    place = _placing(figure, height)
    figure.text(_EDGE / _WIDTH, 1 - 0.3 / height, fitted(title, 72 * (_WIDTH - 2 * _EDGE), 10), fontsize=10,
                color=FAINT, va="center")  # fmt: skip
    figure.text(_EDGE / _WIDTH, 1 - 0.45 / height, sentence, fontsize=12, va="top")
    pictures = {"photograph": photograph, "map": np.asarray(heatmap.draw(values, "magnitude"))}
    for i, (name, pixels) in enumerate(pictures.items()):
        if pixels is None:
            continue
        axis = place(_EDGE + i * (_TILE + 0.2), head + 0.3, _TILE, _TILE)
        axis.imshow(pixels)
        axis.set_title(name, fontsize=10, color=FAINT)
        axis.axis("off")
    left = _EDGE + 2 * (_TILE + 0.2) + 0.2
    _answers(place(left, head, _WIDTH - _EDGE - left, middle), answers)
    curves = {"weights": (_weights, 0.45), "faithfulness": (_faithfulness, 0.65), "convergence": (_convergence, 1.75)}
    left, top = _EDGE, head + middle + 0.5
    for question, (draw, margin) in curves.items():
        width = (_WIDTH - 2 * _EDGE - 0.45 - 0.65 - 1.75 - 0.4) / 3
        if question in verdict["answers"]:
            axis = place(left + margin, top, width, 2.6)
            draw(axis, verdict["answers"][question]["numbers"])
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
        left += margin + width + 0.2
    return figure


def _placing(figure: "Figure", height: float) -> Callable[[float, float, float, float], Any]:
    """Return a function that adds axes at a distance from the left and the top, all in inches."""
    return lambda left, top, wide, high: figure.add_axes(
        (left / _WIDTH, 1 - (top + high) / height, wide / _WIDTH, high / height)
    )


def _answer(verdict: Mapping[str, Any], question: str) -> tuple[str, str, str, float]:
    """Return a question's level, the question, its answer in lines, and their height in inches."""
    answer = verdict["answers"].get(question)
    text = _plain(answer["sentence"]) if answer else f"not asked: {verdict['unanswered'].get(question, '')}"
    lines = wrapped(text, 72 * (_WIDTH - 2 * _EDGE - 2 * (_TILE + 0.2) - 0.2 - _BADGE), 8, max_lines=3)
    return answer["level"] if answer else "-", QUESTIONS[question], lines, 0.34 + 0.145 * (1 + lines.count("\n"))


def _answers(axis: Any, answers: Sequence[tuple[str, str, str, float]]) -> None:
    """List the six answers; the level is written as text, not only as a colour."""
    width, height = (side / axis.figure.dpi for side in axis.get_window_extent().size)
    axis.axis("off")
    axis.set(xlim=(0, width), ylim=(height, 0))
    top = 0.1
    for level, question, lines, step in answers:
        ink = {"-": FAINT, "weak": "#18181B"}.get(level, "white")
        axis.text(0.05, top, level, color=ink, va="top", fontsize=9, weight="bold",
                  bbox={"boxstyle": "round,pad=0.3", "color": LEVELS.get(level, "white")})  # fmt: skip
        axis.text(_BADGE, top, question, va="top", fontsize=10)
        axis.text(_BADGE, top + 0.19, lines, va="top", fontsize=8, color=FAINT)
        top += step


def _weights(axis: Any, numbers: Mapping[str, Any]) -> None:
    for rows, count, label, style in (
        (numbers["cascade"], "reinitialized", "from the top down", "-o"),
        (numbers["single"], "from_top", "this layer alone", ":s"),
    ):
        axis.plot([row[count] for row in rows], [row["spearman"] for row in rows], style, markersize=4, label=label,
                  color="#0072B2" if style == "-o" else "#CC79A7")  # fmt: skip
    _marks(axis.axhline, numbers["null"]["spearman"])
    axis.set_xscale("log")
    ticks = [row["reinitialized"] for row in numbers["cascade"]]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(min(-0.1, *axis.get_ylim()), 1.05)
    axis.grid(axis="y", linewidth=0.4, alpha=0.6)
    axis.set_title("weights re-initialised: similarity to the map", fontsize=10)
    axis.set_xlabel(f"layers counted from the top, of {numbers['layers']}", fontsize=9)
    _legend(axis, 2)


def _faithfulness(axis: Any, numbers: Mapping[str, Any]) -> None:
    curves = numbers["replacements"]["blur"]
    colours = {"map": "#0072B2", "edges": "#CC79A7", "random": FAINT}
    for order, curve in curves.items():
        shares = np.linspace(0, 100, len(curve["deletion"]))
        axis.plot(shares, curve["insertion"], color=colours[order], label=f"{order}, inserted")
        axis.plot(shares, curve["deletion"], color=colours[order], linestyle="--", label=f"{order}, deleted")
    axis.grid(axis="y", linewidth=0.4, alpha=0.6)
    axis.set_title("score as pixels are inserted or deleted (blur)", fontsize=10)
    axis.set_xlabel("% of the pixels, strongest first", fontsize=9)
    axis.set_ylabel("0: all blurred, 1: none", fontsize=9, labelpad=0)
    _legend(axis, 3)


def _convergence(axis: Any, numbers: Mapping[str, Any]) -> None:
    """Draw the cosine at each layer, from the scores down to the image."""
    rows: Sequence[Mapping[str, Any]] = numbers["depths"]
    axis.plot([row["cosine"] for row in rows], range(len(rows)), "-o", markersize=4, color="#0072B2")
    _marks(axis.axvline, numbers["null"])
    axis.set_yticks(range(len(rows)), told_apart([row["layer"] for row in rows], 72 * 1.65, 8))
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(min(-0.25, *axis.get_xlim()), 1.05)
    axis.grid(axis="x", linewidth=0.4, alpha=0.6)
    axis.set_title("random directions sent back", fontsize=10)
    axis.set_xlabel("mean cosine, from the scores down to the image", fontsize=9)
    _legend(axis, 1)


def _marks(line: Callable[..., Any], marks: Mapping[str, float]) -> None:
    """Mark the levels of random maps: unrelated below one line, mostly the same above the other."""
    for key, text, level in (("half", "above: mostly the same", "no"), ("unrelated", "below: unrelated", "yes")):
        line(marks[key], color=LEVELS[level], linewidth=0.9, linestyle="--" if key == "half" else ":", label=text)


def _legend(axis: Any, columns: int) -> None:
    """Write below the axis what the lines are, where no curve comes."""
    axis.legend(fontsize=8, frameon=False, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.16),
                columnspacing=1.2, borderaxespad=0)  # fmt: skip


def _plain(sentence: str) -> str:
    """Return a sentence without the asterisks that mark italics."""
    return sentence.replace("*", "")
