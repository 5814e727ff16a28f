"""`undertow models`: what can be named."""

import json
from dataclasses import asdict

import click


@click.command(
    short_help="What can be named, and what works offline.",
    epilog="\b\nExamples:\n  undertow models\n  undertow models resnet\n  undertow models vgg --json",
)
@click.argument("word", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list instead of a table.")
def models(word: str | None, as_json: bool) -> int:
    """List the models whose reference contains WORD, and which of them work offline."""
    from rich.console import Console
    from rich.table import Table

    from .. import models as known

    rows = known.listing(word)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=1))
        return 0
    table = Table(box=None)
    for heading in ("reference", "weights", "offline", "why"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "reference")
    for row in rows:
        table.add_row(row.reference, row.weights, "yes" if row.offline else "no", row.why)
    Console().print(table)
    return 0
