"""`undertow diagnose`: what is wrong in a run, why, and what to try."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

_MARKS = {"error": "bold red", "warning": "yellow", "info": "cyan"}
FAILED = 1


@click.command(
    short_help="Why gradients are zero, small or broken.",
    epilog="\b\nExamples:\n  undertow diagnose runs/fashion\n  undertow diagnose runs/a runs/b --json\n"
    "  undertow diagnose runs/a --fail-on warning   exit code 1 if there is one\n\n"
    "Record with `record(..., diagnose=True)` or `undertow record --diagnose`, so that causes can be proved.",
)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--fail-on", type=click.Choice(["info", "warning", "error"]), help="Exit with 1 from this severity on.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: for each run its findings and what was checked.")
def diagnose(runs: Sequence[Path], fail_on: str | None, as_json: bool) -> int:
    """Say what is wrong, or remarkable, in each of RUNS: the cause, what proves it, and what to try."""
    from ..diagnosis import SEVERITIES
    from ..diagnosis import diagnose as diagnosed
    from ..runs import Run

    found = {str(run): diagnosed(Run(run)) for run in runs}
    if as_json:
        plain = [
            {"run": run, "findings": [one.to_dict() for one in findings], "checked": findings.checked}
            for run, findings in found.items()
        ]
        click.echo(json.dumps(_plain(plain), indent=1, allow_nan=False))
    else:
        for run, findings in found.items():
            _show(run, findings)
    worst = [SEVERITIES.index(findings[0].severity) for findings in found.values() if findings]
    return FAILED if fail_on and max(worst, default=-1) >= SEVERITIES.index(fail_on) else 0


def _show(run: str, findings: Any) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console()
    console.print(Text(run, "bold"), end=": ")
    console.print(f"{len(findings)} finding{'s' if len(findings) > 1 else ''}" if findings else "nothing found")
    for one in findings:
        console.print(Text.assemble((one.severity, _MARKS[one.severity]), f"  {one.cause}"))
        for text, style in ((one.sentence, ""), (one.remedy, "italic"), (f"Source: {one.source}.", "dim")):
            console.print(Padding(Text(text, style), (0, 0, 0, 4)))
    unchecked = {name: said for name, said in findings.checked.items() if said != "checked"}
    done = ", ".join(name for name in findings.checked if name not in unchecked)
    console.print(Text(f"checked: {done}", "dim"))
    for name, said in unchecked.items():
        console.print(Text(f"{name}: {said}", "dim"))


def _plain(value: Any) -> Any:
    """Return what JSON has words for: what is infinite or not a number becomes null."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
