"""`undertow models`: what can be named."""

from dataclasses import asdict

import click

from .photographs import json_option
from .printing import print_json, print_table


@click.command(
    short_help="What can be named, and what works offline.",
    epilog="\b\nExamples:\n  undertow models\n  undertow models resnet\n  undertow models vgg --json",
)
@click.argument("word", required=False)
@json_option(help="Print one JSON list instead of a table.")
def models(word: str | None, as_json: bool) -> int:
    """List the models whose reference contains WORD, and which of them work offline."""
    from ..models import listing

    rows = listing(word)
    if as_json:
        print_json([asdict(row) for row in rows])
        return 0
    cells = [(row.reference, row.weights, "yes" if row.offline else "no", row.why) for row in rows]
    print_table(("reference", "weights", "offline", "why"), cells)
    return 0
