"""`undertow check`: is a run whole, and what is lost where it is not?"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .photographs import json_option
from .printing import echo, print_json
from .sweeps import is_sweep

if TYPE_CHECKING:
    from ..runs import Check

DAMAGED = 2


@click.command(
    short_help="Is a run whole, as it was written?",
    epilog="\b\nExamples:\n  undertow check runs/vgg16\n  undertow check runs/vgg16 --json\n\n"
    "The exit code is 0 if RUN is whole, and 2 if it is not.",
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--repair", is_flag=True, help="Of a sweep: take damaged parts out, so that its command does them again.")
@json_option(help="Print one JSON object instead of lines.")
def check(run: Path, repair: bool, as_json: bool) -> int:
    """Read every file of RUN against its checksum, its table and the counts of its batches.

    What is damaged or missing is named, with how many batches have lost rows by it and what can be done. Files that a
    killed process left are named too; they do not count, and recording again clears them.
    """
    from ..errors import InputError
    from ..runs import Run

    if is_sweep(run):
        return _check_sweep(run, repair, as_json)
    if repair:
        raise InputError("--repair is for the folder of a sweep; of a run, restore what is named from a copy")
    checked = Run(run).check()
    if as_json:
        print_json(checked.to_dict())
    else:
        _print(checked)
    return 0 if checked.whole else DAMAGED


def _check_sweep(folder: Path, repair: bool, as_json: bool) -> int:
    from ..sweep import Sweep

    checked = Sweep(folder).check(repair)
    if as_json:
        print_json(checked.to_dict())
        return 0 if checked.whole or repair else DAMAGED
    kind = "whole" if checked.whole else f"{len(checked.faults)} part(s) damaged"
    missing = f"; {checked.missing} images are missing: its command goes on" if checked.missing else ""
    echo(f"{folder}: {kind}; {checked.files} files read{missing}")
    for reason in checked.faults.values():
        remedy = "taken out: its command does it again" if repair else "undertow check --repair takes its part out"
        echo(f"  {reason}; {remedy}")
    if checked.strangers:
        echo(f"  not of this sweep: {', '.join(checked.strangers[:5])}{', ...' if len(checked.strangers) > 5 else ''}")
    return 0 if checked.whole or repair else DAMAGED


def _print(checked: "Check") -> None:
    state = "finished" if checked.finished else "not finished: recording again with the same settings goes on with it"
    kind = "whole" if checked.whole else f"{len(checked.faults)} file(s) damaged or missing"
    echo(f"{checked.run}: {kind}; {checked.files} files with {checked.batches} batches read, {state}")
    for fault in checked.faults:
        lost = f" ({fault.batches} batches)" if fault.batches > 0 else ""
        echo(f"  {fault.file} {fault.reason}{lost}; {fault.remedy}")
    if checked.unverified:
        echo(f"  {checked.unverified} files have no checksums: they were written by an earlier version")
    for files, what in (
        (checked.orphans, "of batches that were not published"),
        (checked.strangers, "not of this run"),
    ):
        if files:
            echo(f"  {what}: {', '.join(files[:5])}{', ...' if len(files) > 5 else ''}")
