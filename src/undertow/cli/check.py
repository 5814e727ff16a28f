"""`undertow check`: is a run whole, and what is lost where it is not?"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .photographs import json_option
from .printing import echo, print_json

if TYPE_CHECKING:
    from ..runs.check import Check

DAMAGED = 2


@click.command(
    short_help="Is a run whole, as it was written?",
    epilog="\b\nExamples:\n  undertow check runs/vgg16\n  undertow check runs/* --json\n\n"
    "The exit code is 0 if all of RUNS are whole, and 2 if one is not.",
)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@json_option(help="Print one JSON list instead of lines.")
def check(runs: Sequence[Path], as_json: bool) -> int:
    """Read every file of RUNS against its checksum, its table and the counts of its batches.

    What is damaged or missing is named, with how many batches have lost rows by it and what can be done. Files that a
    killed process left are named too; they do not count, and recording again clears them.
    """
    from ..runs import Run

    checks = [Run(run).check() for run in runs]
    if as_json:
        print_json([found.to_dict() for found in checks])
    else:
        for found in checks:
            _print(found)
    return 0 if all(found.whole for found in checks) else DAMAGED


def _print(found: "Check") -> None:
    state = "finished" if found.finished else "not finished: recording again with the same settings goes on with it"
    kind = "whole" if found.whole else f"{len(found.faults)} file(s) damaged or missing"
    echo(f"{found.run}: {kind}; {found.files} files with {found.batches} batches read, {state}")
    for fault in found.faults:
        lost = f" ({fault.batches} batches)" if fault.batches > 0 else ""
        echo(f"  {fault.file} {fault.reason}{lost}; {fault.remedy}")
    if found.unverified:
        echo(f"  {found.unverified} files have no checksums: they were written by an earlier version")
    for files, what in ((found.orphans, "of batches that were not published"), (found.strangers, "not of this run")):
        if files:
            echo(f"  {what}: {', '.join(files[:5])}{', ...' if len(files) > 5 else ''}")
