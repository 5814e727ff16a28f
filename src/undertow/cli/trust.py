"""`undertow trust`: may the maps of these photographs be believed?"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .photographs import RULES, device_option, for_each, json_option, out_option, photographs_argument

if TYPE_CHECKING:
    from ..verdict.photograph import JudgedPhotograph

EXAMPLES = """\b
Examples:
  undertow trust cat.jpg --model demo
  undertow trust cat.jpg --model torchvision:resnet50 --rule guided --rule gradient --estimator smoothgrad:10
  undertow trust holiday/ --model demo --target "tiger cat" --estimator grad-cam:_conv_head --rule gradient --json
"""


@click.command(short_help="May a map be believed? Six questions, and a sentence.", epilog=EXAMPLES)
@photographs_argument
@click.option(
    "--model", "reference", metavar="REF", required=True, help="demo, torchvision:NAME, timm:NAME, FILE.py:FUNCTION."
)
@click.option("--rule", "rules", multiple=True, type=click.Choice(RULES), help="May be repeated; guided if left out.")
@click.option(
    "--estimator",
    "estimators",
    metavar="HOW",
    multiple=True,
    help="gradient, smoothgrad[:N], integrated[:N], input-times, grad-cam:LAYER, guided-grad-cam:LAYER.",
)
@click.option("--target", metavar="CLASS", help="A number or a name. Default: the predicted class.")
@click.option(
    "--weights",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A .safetensors file, or a state dict saved by torch.save.",
)
@click.option("--seed", default=0, show_default=True, help="Of random maps, classes, weights and noise.")
@click.option("--samples", default=19, show_default=True, help="Random maps that stand for chance.")
@device_option
@out_option
@json_option
def trust(
    photographs: Sequence[Path],
    reference: str,
    rules: Sequence[str],
    estimators: Sequence[str],
    target: str | None,
    weights: Path | None,
    device: str,
    out: Path,
    as_json: bool,
    **options: Any,
) -> int:
    """Ask whether the map of each IMAGE deserves belief.

    Does it depend on the class, and on the trained weights; is it more than edges; do its pixels carry the score; does
    it stay under noise; do backward directions stay distinct? Writes verdict.json and a picture for each rule. What it
    takes is said beforehand. A photograph that cannot be judged is named, the others are done all the same, and the
    exit code is 2.
    """
    from .. import images, models
    from ..attribution.estimators import resolve
    from ..classifier import find_class
    from ..photographs import on_device
    from ..verdict.photograph import pairs_of, trust_photograph, write

    paths = images.find(photographs)
    names = list(dict.fromkeys(resolve(word).name for word in estimators)) or ["gradient"]
    pairs = pairs_of(list(dict.fromkeys(rules)) or ["guided"], names)
    classifier = models.load(reference, weights)
    class_id = None if target is None else find_class(classifier, target)
    device = on_device(classifier, device)
    with PassesBar(classifier, paths, pairs, device, options["samples"]) as bar:

        def work(path: Path, folder: Path) -> dict[str, Any]:
            judged = trust_photograph(
                classifier, path, pairs=pairs, target=class_id, device=device, advance=bar.advance, **options
            )
            result = write(judged, classifier, folder)
            if not as_json:
                print_verdicts(judged, folder)
                for note in result["notes"]:
                    bar.print(f"no picture: {note}")
            return result

        return for_each(paths, out, work, verb="judged", as_json=as_json, complain=bar.print)


class PassesBar:
    """A bar on stderr that counts images through the network, after a line that says how many there will be."""

    def __init__(
        self, classifier: Any, photographs: Sequence[Path], pairs: Sequence[tuple[str, str]], device: str, samples: int
    ) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._cost_arguments = (classifier, photographs, pairs, device, samples)
        self.console = Console(stderr=True)
        columns = (TextColumn("{task.percentage:3.0f} %"), BarColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=self.console, transient=True)

    def __enter__(self) -> "PassesBar":
        total = self._total()
        self.progress.start()
        self.task = self.progress.add_task("", total=total)
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def _total(self) -> int | None:
        """Return the number of images through the network, and print it, by the first photograph that can be read."""
        from ..errors import PhotographError
        from ..verdict.photograph import cost_of

        classifier, photographs, pairs, device, samples = self._cost_arguments
        for path in photographs:
            try:
                cost = cost_of(classifier, path, pairs, device, samples)
            except PhotographError:
                continue
            self.print(f"{len(photographs)} photograph(s), {len(pairs)} map(s) of each; for a photograph: {cost}")
            return len(photographs) * (cost.forward + cost.backward)
        return None

    def advance(self, images: int) -> None:
        """Move the bar on."""
        self.progress.advance(self.task, images)

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_verdicts(judged: "JudgedPhotograph", folder: Path) -> None:
    """Print each verdict as a table with its sentence."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for name, verdict in judged.verdicts.items():
        table = Table(title=f"{judged.path.name}: {name}, {verdict.target_name}", title_justify="left", box=None)
        for column, justify in (("question", "left"), ("answer", "left"), ("value", "right"), ("", "left")):
            table.add_column(column, justify=justify)  # type: ignore[arg-type]
        for question, answer in verdict.answers.items():
            table.add_row(question, answer.level, f"{answer.value:.2f}", answer.sentence)
        for question, why in verdict.unanswered.items():
            table.add_row(question, "-", "", why)
        console.print(table)
        console.print(verdict.sentence, highlight=False, markup=False, soft_wrap=True, style="bold")
        console.print(f"  {verdict.seconds:.1f} s -> {folder}\n", highlight=False, markup=False, soft_wrap=True)
