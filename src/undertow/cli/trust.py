"""`undertow trust`: may the maps of these photographs be believed?"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..verdict.photograph import Judged

RULES = ("gradient", "deconvnet", "guided")

EXAMPLES = """\b
Examples:
  undertow trust cat.jpg --model demo
  undertow trust cat.jpg --model torchvision:resnet50 --rule guided --rule gradient --estimator smoothgrad:10
  undertow trust holiday/ --model demo --target "tiger cat" --estimator grad-cam:_conv_head --rule gradient --json
"""


@click.command(short_help="May a map be believed? Six questions, and a sentence.", epilog=EXAMPLES)
@click.argument("photographs", metavar="IMAGE...", nargs=-1, required=True, type=click.Path(path_type=Path))
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
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@click.option(
    "--out",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("undertow-out"),
    show_default=True,
    help="Gets a folder for each photograph; files of the same names are replaced.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def trust(
    photographs: Sequence[Path],
    reference: str,
    rules: Sequence[str],
    estimators: Sequence[str],
    target: str | None,
    weights: Path | None,
    seed: int,
    samples: int,
    device: str,
    out: Path,
    as_json: bool,
) -> int:
    """Ask whether the map of each IMAGE deserves belief.

    Does it depend on the class, and on the trained weights; is it more than edges; do its pixels carry the score; does
    it stay under noise; do backward directions stay distinct? Writes verdict.json and a picture for each rule. What it
    takes is said beforehand. A photograph that cannot be judged is named, the others are done all the same, and the
    exit code is 2.
    """
    from .. import images, models
    from ..attribution.estimators import resolve
    from ..files import distinct
    from ..frameworks.base import load
    from ..verdict.photograph import ask_for, trust_photograph, write
    from . import one_line
    from .explain import folder_label

    found = images.find(photographs)
    asked = list(dict.fromkeys(resolve(word).name for word in estimators)) or ["gradient"]
    pairs = ask_for(list(dict.fromkeys(rules)) or ["guided"], asked)
    classifier = models.load(reference, weights)
    class_id = None if target is None else models.find_class(classifier, target)
    device = load("torch").device(device)
    classifier.module.to(device)
    started = time.perf_counter()
    results: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    with Passes(classifier, found, pairs, device, samples) as passes:
        for path, folder in zip(found, distinct([folder_label(p, found) for p in found]), strict=True):
            try:
                judged = trust_photograph(
                    classifier,
                    path,
                    pairs=pairs,
                    target=class_id,
                    device=device,
                    seed=seed,
                    samples=samples,
                    advance=passes.advance,
                )
                results.append({**write(judged, classifier, out / folder), "folder": str(out / folder)})
            except Exception as error:
                if "--debug" in sys.argv:
                    raise
                failed.append({"photograph": str(path), "error": one_line(error)})
                passes.tell(f"error: {one_line(error)}")
                continue
            if not as_json:
                tell(judged, out / folder)
                for note in results[-1]["notes"]:
                    passes.tell(f"no picture: {note}")
    if as_json:
        summary = {"results": results, "failed": failed, "seconds": round(time.perf_counter() - started, 3)}
        click.echo(json.dumps(summary, indent=1, ensure_ascii=False))
    elif failed:
        click.echo(f"{len(results)} of {len(found)} photographs judged, {len(failed)} not", err=True)
    return 2 if failed else 0


class Passes:
    """A bar on stderr that counts images through the network, after a line that says how many there will be."""

    def __init__(
        self, classifier: Any, found: Sequence[Path], pairs: Sequence[tuple[str, str]], device: str, samples: int
    ) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.asked = (classifier, found, pairs, device, samples)
        self.console = Console(stderr=True)
        columns = (TextColumn("{task.percentage:3.0f} %"), BarColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=self.console, transient=True)

    def __enter__(self) -> "Passes":
        total = self._said()
        self.progress.start()
        self.task = self.progress.add_task("", total=total)
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def _said(self) -> int | None:
        """Say what it takes, by the first photograph that can be read."""
        from ..errors import PhotographError
        from ..verdict.photograph import cost_of

        classifier, found, pairs, device, samples = self.asked
        for path in found:
            try:
                cost = cost_of(classifier, path, pairs, device, samples)
            except PhotographError:
                continue
            self.tell(f"{len(found)} photograph(s), {len(pairs)} map(s) of each; for a photograph: {cost}")
            return len(found) * (cost.forward + cost.backward)
        return None

    def advance(self, images: int) -> None:
        """Move the bar on."""
        self.progress.advance(self.task, images)

    def tell(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def tell(judged: "Judged", folder: Path) -> None:
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
