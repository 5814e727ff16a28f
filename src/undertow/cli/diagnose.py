"""`undertow diagnose`: what is wrong in a run, why, and what to try."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .photographs import json_option
from .printing import print_json, shown

_COLOURS = {"error": "bold red", "warning": "yellow", "info": "cyan"}
FAILED = 1


@click.command(
    short_help="Why gradients are zero, small or broken.",
    epilog="\b\nExamples:\n  undertow diagnose runs/fashion\n  undertow diagnose runs/a runs/b --json\n"
    "  undertow diagnose runs/a --fail-on warning   exit code 1 if there is one\n\n"
    "Record with `record(..., diagnose=True)` or `undertow record --diagnose`, so that causes can be proved.",
)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--fail-on", type=click.Choice(["info", "warning", "error"]), help="Exit with 1 from this severity on.")
@json_option(help="Print JSON: for each run its findings and what was checked.")
def diagnose(runs: Sequence[Path], fail_on: str | None, as_json: bool) -> int:
    """Say what is wrong, or remarkable, in each of RUNS: the cause, what proves it, and what to try."""
    from ..diagnosis import SEVERITIES
    from ..diagnosis import diagnose as diagnose_run
    from ..runs import Run

    findings_of = {str(run): diagnose_run(Run(run)) for run in runs}
    if as_json:
        print_json(
            [
                {"run": run, "findings": [finding.to_dict() for finding in findings], "checked": findings.checked}
                for run, findings in findings_of.items()
            ]
        )
    else:
        for run, findings in findings_of.items():
            _print(run, findings)
    worst = [SEVERITIES.index(findings[0].severity) for findings in findings_of.values() if findings]
    return FAILED if fail_on and max(worst, default=-1) >= SEVERITIES.index(fail_on) else 0


def _print(run: str, findings: Any) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console()
    console.print(shown(run, "bold"), end=": ")
    console.print(f"{len(findings)} finding{'s' if len(findings) > 1 else ''}" if findings else "nothing found")
    for finding in findings:
        console.print(Text.assemble((finding.severity, _COLOURS[finding.severity]), shown(f"  {finding.cause}")))
        source = f"Source: {finding.source}."
        for text, style in ((finding.sentence, ""), (finding.remedy, "italic"), (source, "dim")):
            console.print(Padding(shown(text, style), (0, 0, 0, 4)))
    unchecked = {name: reason for name, reason in findings.checked.items() if reason != "checked"}
    checked = ", ".join(name for name in findings.checked if name not in unchecked)
    console.print(shown(f"checked: {checked}", "dim"))
    for name, reason in unchecked.items():
        console.print(shown(f"{name}: {reason}", "dim"))
