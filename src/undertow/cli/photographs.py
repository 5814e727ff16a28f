"""What the commands about photographs share: options, and the loop that goes on after a photograph that fails."""

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import printable
from ..references import FORMS
from ..rules import ATTENTION, TABLES
from ..signals import Terminated, interrupts
from .completing import complete_model
from .errors import debugging, error_line
from .printing import echo, nobody_reads, print_json

if TYPE_CHECKING:
    from ..classifier import Classifier

RULES = ("gradient", "deconvnet", "guided")
WITHOUT_RELU = ("gradient", "attnlrp")
ALL_RULES = (*RULES, *TABLES, *ATTENTION)

photographs_argument = click.argument(
    "photographs", metavar="IMAGE...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
out_option = click.option(
    "--out",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("undertow-out"),
    show_default=True,
    help="Gets a folder for each photograph; files of the same names are replaced.",
)
_model = click.option(
    "--model", "reference", metavar="REF", required=True, shell_complete=complete_model, help=f"{FORMS}."
)
_classes = click.option(
    "--classes",
    metavar="TEXTS",
    help="What a CLIP scores (open_clip:, or hf: of a CLIP or SigLIP): texts between commas, FILE.txt, or imagenet.",
)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --model, and --classes for a network that scores texts."""
    return _model(_classes(command))


# these differ in their help
weights_option = partial(click.option, "--weights", metavar="FILE", type=click.Path(path_type=Path))
preprocess_option = click.option(
    "--preprocess",
    metavar="HOW",
    help="How pixels are scaled: 0..1, -1..1, 0..255, imagenet or caffe, each also with a size, as in imagenet@192. "
    "Default: as the model's own source says.",
)
output_option = click.option(
    "--output", metavar="PART", help="The part of the network's output that holds the scores, as in out, 1 or heads.1."
)
figure_option = click.option(
    "--figure",
    "ending",
    type=click.Choice(("png", "svg", "pdf")),
    default="png",
    show_default=True,
    help="How the panel, or each verdict's picture, is written.",
)
ground_option = click.option(
    "--ground",
    type=click.Choice(("white", "dark", "transparent")),
    default="white",
    show_default=True,
    help="What figures are drawn on; on transparent they can be read on white and on black.",
)
json_option = partial(click.option, "--json", "as_json", is_flag=True)


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --device, --out and --json to a command that fills a folder for each photograph."""
    return device_option(out_option(json_option(help="Print one JSON object instead of tables.")(command)))


def load_classifier(
    reference: str,
    weights: Path | None = None,
    preprocess: str | None = None,
    output: str | None = None,
    classes: str | None = None,
) -> "Classifier":
    """Load a classifier; that the scale of its pixels is a guess is told on stderr, whatever else is printed."""
    from .. import models
    from ..errors import ModelError
    from ..text_model import READS_TEXT, TextModel

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=models.GUESSED)
        classifier = models.load(reference, weights, preprocess, output, classes)
    if isinstance(classifier, TextModel):
        raise ModelError(f"{printable(reference)}: {READS_TEXT}")
    if classifier.guessed:
        echo(f"note: {models.guess_of(classifier)}", err=True)
    return classifier


def input_line(classifier: "Classifier") -> str:
    """Say what becomes of a photograph before the network, and who says so."""
    from ..scales import describe

    return f"input: {describe(classifier.preprocessing)} ({classifier.preprocessing_from})"


def for_each(
    photographs: Sequence[Path],
    out: Path,
    work: Callable[[Path, Path], dict[str, Any]],
    *,
    verb: str,
    as_json: bool,
    print_error: Callable[[str], object] | None = None,
    bar: AbstractContextManager[object] | None = None,
) -> int:
    """Do the work for each photograph, with a folder of its own; return the exit code, 2 if one failed.

    Args:
        work: from a photograph and its folder to the result for JSON; prints what is to be printed without --json.
        verb: what was done, for the summary: "explained".
        print_error: prints a line on stderr; `echo` does it if None.
        bar: entered while the work goes on, and left before the summary is printed.
    """
    from ..files import distinct

    print_error = print_error or partial(echo, err=True)
    started = time.perf_counter()
    results: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    folders = [out / name for name in distinct([_label(path, photographs) for path in photographs])]
    with bar or nullcontext(), interrupts() as interrupted:
        for path, folder in zip(photographs, folders, strict=True):
            try:
                results.append({**work(path, folder), "folder": str(folder)})
            except (Exception, SystemExit, KeyboardInterrupt) as error:  # a network may raise any of them itself
                if debugging() or interrupted or isinstance(error, Terminated) or nobody_reads(error):
                    raise
                text = error_line(error)
                if not isinstance(error, Exception):
                    text = f"{printable(path)}: the network would end the program by {text}; take that out"
                failed.append({"photograph": str(path), "error": text})
                print_error(f"error: {text}")
    if as_json:
        summary = {"results": results, "failed": failed, "seconds": round(time.perf_counter() - started, 3)}
        print_json(summary)
    elif failed:
        echo(f"{len(results)} of {len(photographs)} photographs {verb}, {len(failed)} not", err=True)
    return 2 if failed else 0


def _label(path: Path, photographs: Sequence[Path]) -> str:
    """Name a photograph by its stem; by its whole path where two share the stem."""
    same = [other for other in photographs if other.stem.casefold() == path.stem.casefold()]
    return path.stem if len(same) == 1 else str(path)
