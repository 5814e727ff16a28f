"""The result of `trust`: plain data that can be printed, saved and drawn."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy.typing as npt

YES, WEAK, NO = "yes", "weak", "no"
QUESTIONS = ("class", "weights", "input", "faithfulness", "stability", "convergence")


@dataclass(frozen=True)
class Answer:
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


@dataclass(frozen=True)
class Verdict:
    """The answers about one map.

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


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
