"""The confusion table of the planted faults, as `docs/studies/diagnosis.md` has it.

PYTHONPATH=tests python -m diagnosis.confusion      records all networks, and renews the table in the page
"""

import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import undertow as ut
from diagnosis.planted import PLANTED, recorded

PAGE = Path(__file__).parents[2] / "docs" / "studies" / "diagnosis.md"
BEGIN, END = "<!-- planted: begin -->", "<!-- planted: end -->"
NOTHING = "nothing"


def table(found: Mapping[str, Iterable[ut.Finding]]) -> str:
    """Return the table as Markdown: a row for each planted cause, a column for how it was met.

    Args:
        found: for each planted network, by name, its findings.
    """
    planted, hits, misses, alarms = (Counter[str]() for _ in range(4))
    beside: dict[str, Counter[str]] = {}
    for row in PLANTED:
        causes = {finding.cause for finding in found[row.name]}
        alarming = {finding.cause for finding in found[row.name] if finding.severity != "info"}
        for cause in row.causes or {NOTHING}:
            planted[cause] += 1
            hit = cause in causes if row.causes else not alarming
            (hits if hit else misses)[cause] += 1
            alarms[cause] += len(alarming - row.causes)
            beside.setdefault(cause, Counter()).update(causes - row.causes)
    lines = [
        "| planted | networks | found | missed | false alarms | true informations beside it |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for cause in (cause for cause in (*ut.diagnosis.CAUSES, NOTHING) if cause in planted):
        others = ", ".join(f"{other} ({n})" for other, n in sorted(beside[cause].items())) or "none"
        numbers = (planted[cause], hits[cause], misses[cause], alarms[cause])
        lines.append(f"| {cause} | {' | '.join(map(str, numbers))} | {others} |")
    total = (sum(counter.values()) for counter in (planted, hits, misses, alarms))
    lines.append(f"| **all {len(PLANTED)} networks** | {' | '.join(map(str, total))} | |")
    return "\n".join(lines)


def written() -> str:
    """Return the table that the page has."""
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    """Record every planted network, and write the table into the page."""
    warnings.simplefilter("ignore")
    found = {}
    for row in PLANTED:
        with tempfile.TemporaryDirectory() as folder:
            found[row.name] = ut.diagnose(recorded(folder, row))
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
