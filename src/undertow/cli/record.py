"""`undertow sites` and `undertow record`: choose modules of a network, and record what flows through them."""

import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from .photographs import (
    device_option,
    input_line,
    json_option,
    load_classifier,
    model_options,
    preprocess_option,
    weights_option,
)
from .printing import echo, echo_error, print_json, print_table
from .progress import clock, progress
from .report import report_option, write_with_network
from .report import write as write_page
from .sweeps import run_sweep, split_options, sweep_options

MEASURES = ("norm", "channel-norm", "zero-fraction", "moments", "channel-sums", "histogram", "keep", "keep:sample")


@click.command(
    short_help="Which modules of a network a selection names.",
    epilog="\b\nExamples:\n  undertow sites --model torchvision:vgg16@none 'conv[:2]'\n"
    "  undertow sites --model demo 'conv, linear' --json",
)
@click.argument("selection", metavar="[SITES]", default="**")
@model_options
@preprocess_option
@json_option(help="Print one JSON list instead of a table.")
def sites(selection: str, reference: str, classes: str | None, preprocess: str | None, as_json: bool) -> int:
    """Print the modules that SITES selects, in order of execution: name, kind, output shape, calls.

    SITES is a kind (conv, linear, norm, relu, pool, or a class name), a glob on dotted names (features.*,
    layer4.**.conv2), a slice in order of execution (conv[:2], conv[-1]), parameters (params, params:layer4), or several
    of them with commas.
    """
    from PIL import Image

    from .. import models
    from ..errors import ModelError, printable
    from ..sites import PARAMETER, select
    from ..text_model import TextModel

    with warnings.catch_warnings(action="ignore"):  # only the size of the input matters
        classifier = models.load(reference, preprocess=preprocess, classes=classes)
    if isinstance(classifier, TextModel):
        raise ModelError(f"{printable(reference)} reads text, and sites are listed of networks that read photographs")
    black = Image.new("RGB", (64, 64))
    selected = select(classifier.module, selection, example=classifier.prepare(black))
    if as_json:
        print_json([asdict(site) for site in selected])
        return 0
    cells = [
        (
            site.name,
            site.kind,
            _shape(site.shape) if site.calls or site.kind == PARAMETER else "never called",
            "" if site.kind == PARAMETER else site.calls,
        )
        for site in selected
    ]
    print_table(("name", "kind", "output shape", "calls"), cells, right=("calls",))
    return 0


def _shape(shape: Any) -> str:
    return " x ".join(map(str, shape)) if shape and all(isinstance(side, int) for side in shape) else str(shape)


@click.command(
    short_help="Record gradients over a folder of photographs.",
    epilog="\b\nExamples:\n"
    "  undertow record photographs/ --model torchvision:vgg16 --sites 'conv[:2]' --out runs/vgg16\n"
    "  undertow record photographs/ --model demo --measure histogram --limit 250 --out runs/demo --resume\n"
    "  undertow record flowers/ --model nets.py:load --objective loss --measure channel-norm --out runs/flowers",
)
@click.argument("folder", type=click.Path(path_type=Path))
@model_options
@click.option(
    "--out", metavar="RUN", required=True, type=click.Path(path_type=Path, file_okay=False), help="A new folder."
)
@click.option("--sites", "selection", default="conv", show_default=True, help="See `undertow sites --help`.")
@click.option(
    "--measure", "measures", multiple=True, type=click.Choice(MEASURES), help="May be repeated. Default: channel-norm."
)
@click.option("--phase", type=click.Choice(("backward", "forward", "both")), default="backward", show_default=True)
@click.option(
    "--objective",
    type=click.Choice(("predicted", "label", "loss")),
    default="predicted",
    show_default=True,
    help="What is differentiated: the highest score, or the score or cross-entropy of the class that a photograph's "
    "folder is named after.",
)
@click.option("--limit", metavar="N", type=click.IntRange(1), help="At most N photographs, in order of name.")
@click.option("--batch-size", metavar="N", type=click.IntRange(1), help="Default: 4 on a CPU, 32 elsewhere.")
@click.option("--workers", metavar="N", type=click.IntRange(1), default=2, show_default=True, help="Threads that read.")
@weights_option(help="As in `undertow explain`.")
@preprocess_option
@device_option
@click.option("--diagnose", is_flag=True, help="Watch every 8th batch more closely, for `undertow diagnose`.")
@sweep_options("limit", "batch_size", "workers")
@click.option("--resume", is_flag=True, help="Go on with the unfinished run of the same command.")
@report_option
@json_option(help="Print one JSON object.")
def record(
    folder: Path,
    reference: str,
    classes: str | None,
    out: Path,
    selection: str,
    measures: tuple[str, ...],
    weights: Path | None,
    preprocess: str | None,
    device: str,
    resume: bool,
    as_json: bool,
    limit: int | None,
    engine: str | None,
    page: Path | None,
    **options: Any,
) -> int:
    """Record the gradients at SITES for every photograph of FOLDER, each image's own, into the run --out.

    Photographs that cannot be read are named and passed over, and the exit code is 2. Ctrl-C leaves a readable run;
    the same command with --resume goes on with it. With --engine, FOLDER may also be a list (.txt), a column
    (FILE.parquet:COLUMN) or a tar file, and the same command always goes on.
    """
    if engine is not None:
        sites_and_measures = {"sites": selection, "measures": list(measures) or ["channel-norm"]}
        load = partial(load_classifier, reference, weights, preprocess, None, classes)
        options |= {"engine": engine, "limit": limit, "device": device}
        code = _sweep(load, folder, out, as_json, options, sites_and_measures)
        if page and (out / "manifest.json").is_file():  # all processes are done
            write_page([out], page, quiet=as_json)
        return code
    how, options = split_options(options)
    options |= {name: how.pop(name, None) for name in ("batch_size", "workers")}
    if how:
        given = ", ".join("--" + name.replace("_", "-") for name in how)
        raise click.UsageError(f"{given} is of a sweep; add --engine local, torchrun or ray")
    from .. import images
    from ..errors import InputError
    from ..photographs import on_device
    from ..recording.photographs import kept_bytes, record_photographs

    if (out / "manifest.json").exists() and not resume:
        raise InputError(f"{out} is a run already; add --resume to go on with it, or choose another --out")
    count = len(images.find([folder])[:limit])
    classifier = load_classifier(reference, weights, preprocess, None, classes)
    device = on_device(classifier, device)
    if any(measure.startswith("keep") for measure in measures):
        each = kept_bytes(classifier, selection, options["phase"], device)
        echo(f"keep will take {_size(each * count)}: {_size(each)} for each photograph, {count} of them", err=True)
    started = time.monotonic()
    with progress() as bar:
        bar.begin(0, count)
        recorded = record_photographs(
            classifier,
            folder,
            out,
            sites=selection,
            measures=measures or ("channel-norm",),
            limit=limit,
            device=device,
            advance=bar.advance,
            **options,
        )
    for _, error in recorded.failed:
        echo_error(error)
    if as_json:
        print_json(recorded.to_dict(out))
    else:
        failed = f", {len(recorded.failed)} could not be read" if recorded.failed else ""
        before = f", {recorded.before} batches were there already" if recorded.before else ""
        seconds = time.monotonic() - started
        speed = f" in {clock(seconds)}, {recorded.photographs / max(seconds, 1e-9):.1f} images/s"
        echo(f"{recorded.photographs} photographs recorded{speed}{before}{failed}")
        echo(f"  {input_line(classifier)}\n  -> {out}")
        echo(f"Next: undertow quantiles {out}")
    if page:
        write_with_network([out], page, classifier, images.find([folder])[0], device, quiet=as_json)
    return 2 if recorded.failed else 0


def _sweep(
    load: Callable[[], Any],
    source: Path,
    out: Path,
    as_json: bool,
    options: dict[str, Any],
    chosen: dict[str, Any],
) -> int:
    """Record on an engine; return the exit code."""
    from .. import sweep

    how, options = split_options(options)
    objective = options.pop("objective")
    options = {**chosen, **options, "diagnose": 8 if options.pop("diagnose") else False}
    device = options.pop("device")
    how |= {"device": device, "objective": objective, "options": options}
    return run_sweep(sweep.record, load(), str(source), out, load=load, as_json=as_json, **how)


def _size(n_bytes: float) -> str:
    """Return a number of bytes as people read it.

    >>> _size(71_680_000)
    '71.7 MB'
    """
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"
