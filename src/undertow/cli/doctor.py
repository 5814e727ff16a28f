"""`undertow doctor`: what is installed, what works, and what does not fit."""

import click

from .photographs import json_option
from .printing import echo, print_json, print_table

UNFIT = 2


@click.command(
    short_help="What is installed here, and what works.",
    epilog="\b\nExamples:\n  undertow doctor\n  undertow doctor --json   for a bug report",
)
@json_option(help="Print one JSON object instead of tables.")
def doctor(as_json: bool) -> int:
    """Say what is installed here, what can be done with it, and what does not fit, with the remedy.

    The exit code is 2 if something does not fit. That an extra is missing is no fault.
    """
    from ..environment import environment
    from ..models import listing

    found = environment()
    found["offline"] = sum(row.offline for row in listing(None))
    if as_json:
        print_json(found)
        return UNFIT if found["misfits"] else 0
    machine = found["machine"]
    echo(f"{machine['system']}, {machine['processors']} processors, --device auto is {machine['device'] or 'unknown'}")
    echo(", ".join(f"{name} {version}" for name, version in found["versions"].items() if version))
    echo(f"{found['offline']} references of `undertow models` work offline")
    rows = [(e["name"], e["purpose"], "yes" if not e["missing"] else e["remedy"]) for e in found["extras"]]
    print_table(("extra", "for", "installed"), rows)
    for misfit in found["misfits"]:
        echo(f"does not fit: {misfit}")
    return UNFIT if found["misfits"] else 0
