"""`undertow report`: one HTML page of what was explained and recorded."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .printing import echo

if TYPE_CHECKING:
    from ..classifier import Classifier

MAX_BLOCKS, MAX_DEPTH = 80, 4  # a network is shown as deep as it stays readable

WORDS = "undertow.words"  # in a context's meta: what the command was called with


def _checked(_: click.Context, __: click.Parameter, path: Path | None) -> Path | None:
    """Refuse what is no page before any work is done."""
    if path is None:
        return None
    from ..page import check_ending  # it brings in all that a page can show

    return check_ending(path)


report_option = click.option(
    "--report",
    "page",
    metavar="FILE.html",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=_checked,
    help="Also write one HTML page of it, which can be mailed.",
)


@click.command(
    short_help="One HTML page of maps and runs, to look at or to mail.",
    epilog="\b\nExamples:\n  undertow report undertow-out\n  undertow report runs/vgg16 runs/vgg16_bn -o pair.html\n"
    "  undertow report undertow-out runs/a --title 'cats, Monday'",
)
@click.argument("what", metavar="WHAT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("report.html"),
    show_default=True,
    callback=_checked,
)
@click.option("--title", default="undertow", show_default=True)
def report(what: Sequence[Path], out: Path, title: str) -> int:
    """Write one HTML page of WHAT: folders of runs, and of what `explain` and `trust` wrote.

    Everything is in the one file, which asks for nothing when it is opened. Several runs are drawn on the same axes.
    """
    write(what, out, title)
    return 0


def write_with_network(
    what: Sequence[Any], out: Path, classifier: "Classifier", photograph: Path, device: str, quiet: bool = False
) -> None:
    """Write a page that also shows what one photograph's gradient flows through."""
    from ..derive import from_model
    from ..errors import UndertowError
    from ..recording.trace import trace

    network: list[Any] = []
    try:
        x = classifier.prepare(photograph, device)
        blocks = from_model(classifier.module, x)
        for depth in range(2, MAX_DEPTH + 1):
            deeper = from_model(classifier.module, x, depth=depth)
            if len(deeper.blocks) > MAX_BLOCKS:
                break
            blocks = deeper
        network = [(blocks, trace(classifier.module, x))]
    except UndertowError as error:
        echo(f"note: the page is without the network's flow: {error}", err=True)
    write([*what, *network], out, classifier.reference, quiet)


def write(what: Sequence[Any], out: Path, title: str = "undertow", quiet: bool = False) -> None:
    """Write a page and say where it is and how large; `quiet` keeps stdout for JSON."""
    from ..page import report as write_report

    words = click.get_current_context().meta.get(WORDS, ())
    path = write_report(*what, path=out, title=title, command=shlex.join(["undertow", *words]))
    echo(f"page -> {path} ({path.stat().st_size / 1e6:.1f} MB)", err=quiet)
