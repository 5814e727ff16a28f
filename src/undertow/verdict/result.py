"""The result of `trust`: plain data that can be printed, saved and drawn."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..display import BAD, GOOD, POOR, Mark, Part, Pictures, Shown, ShownItem, ShownTable, brief
from ..errors import InputError
from ..images import Photograph, read
from ..show import tiles
from ..show import verdict as picture
from ..show.plots import as_image, drawn_or_saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

YES, WEAK, NO = "yes", "weak", "no"
QUESTIONS = ("class", "weights", "input", "faithfulness", "stability", "convergence")

_COLOURS = {YES: GOOD, WEAK: POOR, NO: BAD}


@dataclass(frozen=True, repr=False)
class Answer(ShownItem):
    """One question's answer. "yes" always speaks for the map, "no" against it, "weak" for neither.

    Attributes:
        value: its main number; what it is stands in `definition`.
        numbers: all other numbers, ready for JSON.
        level: "yes", "weak" or "no", by a null distribution of random maps that `numbers` holds.
        sentence: the answer in words.
        definition: the question, the number and the levels, in words.
        source: the paper that asked it.
    """

    value: float
    numbers: dict[str, Any]
    level: str
    sentence: str
    definition: str
    source: str

    def _shown(self) -> Iterator[Part]:
        yield f"Answer {self.level} ({self.value:.3g}): {_plain(self.sentence)}"
        rows = [("asked", self.definition), ("source", self.source)]
        rows += [(name, brief(number)) for name, number in self.numbers.items()]
        yield ShownTable(("", ""), rows, len(rows))


@dataclass(frozen=True, repr=False)
class Verdict(Shown):
    """The answers about one map; on the last line of a notebook's cell a table.

    Attributes:
        answers: by question: "class", "weights", "input", "faithfulness", "stability", "convergence".
        unanswered: why a question has no answer, by question.
        sentence: the one to read.
        rule, estimator: of the map; both "given" for a map that was passed as an array.
        target, target_name: the explained class.
        seed, samples: of the random maps that were drawn for null distributions, their seed and number.
        passes: images that went through the network, forward alone and forward and backward.
        seconds: wall time.
        values: the judged map, `(C, H, W)`; not in `to_dict`.
    """

    answers: dict[str, Answer]
    unanswered: dict[str, str]
    sentence: str
    rule: str
    estimator: str
    target: int
    target_name: str
    seed: int
    samples: int
    passes: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    values: npt.NDArray[Any] | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return all but the map, ready for JSON."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("answers", "values")}
        return {**plain, "answers": {name: asdict(answer) for name, answer in self.answers.items()}}

    def plot(
        self,
        path: str | Path | None = None,
        photograph: Photograph | npt.NDArray[np.uint8] | None = None,
        *,
        ground: str = "white",
    ) -> "Figure":
        """Draw the answers, the map and the curves behind three of them, as `undertow trust` does.

        Args:
            path: also write it there, as PNG, SVG or PDF; replaced atomically.
            photograph: a path, a Pillow image or uint8 `(H, W, 3)`, shown beside the map.
            ground: "white", "dark" or "transparent".

        Raises:
            InputError: the verdict holds no map, or another ending or ground.
            PhotographError: the photograph cannot be read.
            FrameworkError: matplotlib is missing.
        """
        if self.values is None:
            raise InputError("this verdict holds no map, as one that was read from a file; judge the map again")
        if photograph is not None and not isinstance(photograph, np.ndarray):
            photograph = np.asarray(read(photograph))
        return drawn_or_saved(picture.figure(photograph, self.values, self.to_dict()), path, ground)

    def image(self, photograph: Photograph | npt.NDArray[np.uint8] | None = None) -> "Image":
        """Return what `plot` draws as a Pillow picture; errors as of `plot`."""
        return as_image(self.plot(None, photograph))

    def _shown(self) -> Iterator[Part]:
        yield _plain(self.sentence)
        said = self.target_name in (str(self.target), f"class {self.target}")
        of = self.target_name if said else f"{self.target_name} ({self.target})"
        yield f"Verdict on the map of {of}: {self.rule}, estimator {self.estimator}"
        rows: list[tuple[object, ...]] = [
            (name, Mark(a.level, _COLOURS.get(a.level, POOR)), f"{a.value:.2f}", _plain(a.sentence))
            for name, a in self.answers.items()
        ]
        rows += [(name, "-", "", why) for name, why in self.unanswered.items()]
        yield ShownTable(("question", "answer", "value", ""), rows, len(rows))
        if self.values is not None and (planes := tiles.planes(self.values)):
            yield Pictures(lambda: [("the judged map", tiles.tile(planes[0][1]))])

    def __str__(self) -> str:
        rows = [(name, a.level, f"{a.value:.2f}", a.sentence) for name, a in self.answers.items()]
        rows += [(name, "-", "", why) for name, why in self.unanswered.items()]
        lines = [f"{name:<13}{level:<5}{value:>6}  {text}" for name, level, value, text in rows]
        return "\n".join([self.sentence, *lines])


def verdict_sentence(answers: dict[str, Answer], unanswered: dict[str, str]) -> str:
    """Choose the sentence to read: that of the first question answered "no", the most damning first."""
    order = ("class", "weights", "faithfulness", "input", "stability", "convergence")
    answered = [answers[name] for name in order if name in answers]
    if not answered:
        return "No question could be asked: " + "; ".join(f"{name}: {why}" for name, why in unanswered.items())
    against = [answer for answer in answered if answer.level == NO]
    if against:
        return against[0].sentence
    weak = [name for name in order if name in answers and answers[name].level == WEAK]
    if weak:
        return f"Nothing speaks against the map, but it is weak on {_listed(weak)}. {answers[weak[0]].sentence}"
    return f"Nothing that was asked ({_listed([n for n in order if n in answers])}) speaks against this map."


def _plain(sentence: str) -> str:
    """Return a sentence without the asterisks that mark italics."""
    return sentence.replace("*", "")


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
