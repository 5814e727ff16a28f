"""A finding: one diagnosed fact with its cause, its evidence and its source."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from ..display import BAD, PLAIN, POOR, Mark, Part, Rows, ShownItem, ShownTable, brief, counted

SEVERITIES = ("info", "warning", "error")
CAUSES = (
    *("pooling", "activation", "dead-units", "dead-layer", "vanishing", "exploding", "non-finite", "underflow"),
    *("no-batch-norm", "unreached", "frozen", "detached", "jump", "noise", "no-gradient", "saturated", "zero-weights"),
    *("not-in-optimizer", "no-step", "learning-rate", "clipped", "weight-decay"),
)

_COLOURS = {"info": PLAIN, "warning": POOR, "error": BAD}


@dataclass(frozen=True, repr=False)
class Finding(ShownItem):
    """One diagnosed fact.

    Attributes:
        cause: a code, one of `CAUSES`.
        severity: "info" explains, "warning" is worth a look, "error" prevents the network from learning.
        sites: dotted names of the sites concerned, in order of execution.
        sentence: what was found, with numbers.
        evidence: numbers by name; a prediction is under "predicted", next to "observed".
        remedy: what to try.
        source: a paper, a formula, or the threshold.
    """

    cause: str
    severity: str
    sites: tuple[str, ...]
    sentence: str
    evidence: dict[str, Any] = field(default_factory=dict)
    remedy: str = ""
    source: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; values may still be NaN or infinite."""
        return asdict(self) | {"sites": list(self.sites)}

    def _shown(self) -> Iterator[Part]:
        yield f"Finding ({self.severity}) {self.cause}: {self.sentence}"
        facts = {"sites": brief(self.sites), "remedy": self.remedy, "source": self.source}
        facts |= {name: brief(value) for name, value in self.evidence.items()}
        rows = [(name, text) for name, text in facts.items() if text]
        yield ShownTable(("", ""), rows, len(rows))


class Findings(Rows[Finding]):
    """Findings, the most severe first, and which rules were checked: a list that shows itself as a table.

    Attributes:
        checked: for each rule "checked", "not checked: " and why, or "checked, but " and where it could not look.
    """

    def __init__(self, findings: Iterable[Finding], checked: dict[str, str]) -> None:
        super().__init__(sorted(findings, key=lambda finding: -SEVERITIES.index(finding.severity)))
        self.checked = checked

    def worst(self) -> str | None:
        """Return the highest severity, None if there are no findings.

        >>> Findings([], {}).worst() is None
        True
        """
        return self[0].severity if self else None

    def _like(self, items: list[Finding]) -> Self:
        return type(self)(items, self.checked)

    def _shown(self) -> Iterator[Part]:
        looked = [name for name, answer in self.checked.items() if answer.startswith("checked")]
        rules = f"{len(looked)} of {counted(len(self.checked), 'rule')} checked"
        counts = {severity: sum(f.severity == severity for f in self) for severity in reversed(SEVERITIES)}
        severities = ", ".join(counted(count, severity) for severity, count in counts.items() if count)
        yield f"{counted(len(self), 'finding')}: {severities.replace('infos', 'info')}" if self else "nothing found"
        yield rules
        rows = ((Mark(f.severity, _COLOURS.get(f.severity, PLAIN)), f.cause, f.sentence, f.remedy) for f in self)
        yield ShownTable(("severity", "cause", "finding", "remedy"), rows, len(self))
        unchecked = [(name, answer) for name, answer in self.checked.items() if answer != "checked"]
        yield ShownTable(("rule", "why it could not look, or where"), unchecked, len(unchecked), text=bool(not self))


class NotRecorded(Exception):
    """The run lacks data that a rule needs; the message says what to record."""


class NotLookedAt(Exception):
    """A rule could not look at some of the sites; the message names them and says why. Findings before it stand."""


def called(site: str) -> str:
    """Return a site's name for a sentence: numbers are quoted, the model itself (an empty name) is spelt out.

    >>> called("conv1"), called("0"), called("")
    ('conv1', "'0'", 'the model')
    """
    return f"'{site}'" if site[:1].isdigit() else site or "the model"


def listed(names: Iterable[str], max_names: int = 6) -> str:
    """Join names for a sentence.

    >>> listed(["a", "b", "c"]), listed("abcdefgh", max_names=3)
    ('a, b and c', 'a, b, c and 5 more')
    """
    labels = [called(name) for name in names]
    if len(labels) > max_names:
        return f"{', '.join(labels[:max_names])} and {len(labels) - max_names} more"
    return " and ".join([", ".join(labels[:-1]), labels[-1]]) if len(labels) > 1 else "".join(labels)


def first_of(texts: Sequence[str], most: int = 6) -> str:
    """Join texts for a sentence, the first ones alone where there are many.

    >>> first_of(["1 of 4 at a", "2 of 4 at b"]), first_of(list("abcdefgh"), most=3)
    ('1 of 4 at a, 2 of 4 at b', 'a, b, c and 5 more')
    """
    return ", ".join(texts) if len(texts) <= most else f"{', '.join(texts[:most])} and {len(texts) - most} more"


def percent(share: float) -> str:
    """Format a fraction as a percentage; close to 0 and 100 with as many digits as needed.

    >>> percent(0.75), percent(0.0004), percent(1.0)
    ('75.0 %', '0.04 %', '100 %')
    """
    if share in (0.0, 1.0):
        return f"{100 * share:.0f} %"
    return f"{100 * share:.1f} %" if 0.001 <= share <= 0.999 else f"{100 * share:.3g} %"
