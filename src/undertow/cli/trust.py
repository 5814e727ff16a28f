"""`undertow trust`: may the maps of these photographs be believed?"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .photographs import (
    ALL_RULES,
    figure_option,
    for_each,
    ground_option,
    input_line,
    load_classifier,
    model_options,
    output_option,
    output_options,
    photographs_argument,
    preprocess_option,
    weights_option,
)
from .printing import print_line, print_table
from .report import report_option, write_with_network
from .sweeps import all_of, run_sweep, split_options, sweep_options

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from ..classifier import Classifier
    from ..verdict.photograph import JudgedPhotograph

EXAMPLES = """\b
Examples:
  undertow trust cat.jpg --model demo
  undertow trust cat.jpg --model torchvision:resnet50 --rule guided --rule gradient --estimator smoothgrad:10
  undertow trust holiday/ --model demo --target "tiger cat" --estimator grad-cam:_conv_head --rule gradient --json
"""


@click.command(short_help="May a map be believed? Six questions, and a sentence.", epilog=EXAMPLES)
@photographs_argument
@model_options
@click.option(
    "--rule", "rules", multiple=True, type=click.Choice(ALL_RULES), help="May be repeated; guided if left out."
)
@click.option(
    "--estimator",
    "estimators",
    metavar="HOW",
    multiple=True,
    help="gradient, smoothgrad[:N], integrated[:N], input-times, grad-cam:LAYER, guided-grad-cam:LAYER; "
    "where a layer has its channels may be added, as in grad-cam:LAYER:bhwc.",
)
@click.option("--target", metavar="CLASS", help="A number or a name. Default: the predicted class.")
@weights_option(help="A .safetensors file, or a state dict saved by torch.save.")
@preprocess_option
@output_option
@click.option("--seed", default=0, show_default=True, help="Of random maps, classes, weights and noise.")
@click.option("--samples", default=19, show_default=True, help="Random maps that stand for chance.")
@report_option
@figure_option
@ground_option
@sweep_options()
@output_options
def trust(
    photographs: Sequence[Path],
    reference: str,
    rules: Sequence[str],
    estimators: Sequence[str],
    target: str | None,
    weights: Path | None,
    preprocess: str | None,
    output: str | None,
    classes: str | None,
    device: str,
    out: Path,
    as_json: bool,
    page: Path | None,
    ending: str,
    ground: str,
    **options: Any,
) -> int:
    """Ask whether the map of each IMAGE deserves belief.

    Does it depend on the class, and on the trained weights; is it more than edges; do its pixels carry the score; does
    it stay under noise; do backward directions stay distinct? Writes verdict.json and a picture for each rule. What it
    takes is said beforehand. A photograph that cannot be judged is named, the others are done all the same, and the
    exit code is 2. With --engine the answers go into tables, for many photographs, and the same command goes on.
    """
    from rich.console import Console

    from .. import images, sweep
    from ..attribution.estimators import resolve
    from ..classifier import find_class
    from ..photographs import on_device
    from ..verdict.photograph import pairs_of, trust_photograph, write

    how, options = split_options(options)
    if how and page:
        raise click.UsageError(
            "--report is of photographs that are judged one by one; leave out the options of a sweep"
        )
    if how:
        load = partial(load_classifier, reference, weights, preprocess, output, classes)
        how |= {"load": load, "target": target, "rule": rules or "guided", "estimator": estimators or "gradient"}
        how |= {"options": options, "device": device}
        return run_sweep(sweep.trust, load(), all_of(photographs), out, as_json=as_json, **how)
    paths = images.find(photographs)
    names = list(dict.fromkeys(resolve(word).name for word in estimators)) or ["gradient"]
    pairs = pairs_of(list(dict.fromkeys(rules)) or ["guided"], names)
    classifier = load_classifier(reference, weights, preprocess, output, classes)
    class_id = None if target is None else find_class(classifier, target)
    device = on_device(classifier, device)
    console = Console(stderr=True)
    bar = passes_bar(console)
    task = bar.add_task("", total=total_passes(console, classifier, paths, pairs, device, options["samples"]))

    done: dict[Path, Path] = {}

    def work(path: Path, folder: Path) -> dict[str, Any]:
        judged = trust_photograph(
            classifier, path, pairs=pairs, target=class_id, device=device, advance=partial(bar.advance, task), **options
        )
        result = write(judged, classifier, folder, ending, ground)
        done[path] = folder
        if not as_json:
            print_verdicts(judged, folder, input_line(classifier))
            for note in result["notes"]:
                print_line(console, f"no picture: {note}")
        return result

    print_error = partial(print_line, console)
    code = for_each(paths, out, work, verb="judged", as_json=as_json, print_error=print_error, bar=bar)
    if page and done:
        write_with_network(list(done.values()), page, classifier, next(iter(done)), device, quiet=as_json)
    return code


def total_passes(
    console: "Console",
    classifier: "Classifier",
    photographs: Sequence[Path],
    pairs: Sequence[tuple[str, str]],
    device: str,
    samples: int,
) -> int | None:
    """Return how many images will go through the network, and print it, by the first photograph that can be read."""
    from ..errors import PhotographError
    from ..verdict.photograph import cost_of

    for path in photographs:
        try:
            cost = cost_of(classifier, path, pairs, device, samples)
        except PhotographError:
            continue
        counts = f"{len(photographs)} photograph(s), {len(pairs)} map(s) of each"
        print_line(console, f"{counts}; for a photograph: {cost}")
        return len(photographs) * (cost.forward + cost.backward)
    return None


def passes_bar(console: "Console") -> "Progress":
    """Return a bar for a terminal, of images that went through the network."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.percentage:3.0f} %"), BarColumn(), TimeRemainingColumn())
    # rich would send what is printed on stdout to the bar's console, stderr, also where stdout is a file
    return Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty())


def print_verdicts(judged: "JudgedPhotograph", folder: Path, prepared: str) -> None:
    """Print each verdict as a table with its sentence, and how the photograph was prepared."""
    from rich.console import Console

    console = Console()
    for name, verdict in judged.verdicts.items():
        rows = [(q, answer.level, f"{answer.value:.2f}", answer.sentence) for q, answer in verdict.answers.items()]
        rows += [(question, "-", "", reason) for question, reason in verdict.unanswered.items()]
        title = f"{judged.path.name}: {name}, {verdict.target_name}"
        print_table(("question", "answer", "value", ""), rows, title=title, right=("value",))
        print_line(console, verdict.sentence, "bold")
        print_line(console, f"  {prepared}")
        print_line(console, f"  {verdict.seconds:.1f} s -> {folder}\n")
