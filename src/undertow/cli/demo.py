"""`undertow demo`: the main job on packaged photographs and weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .explain import explain_all
from .photographs import RULES, device_option
from .printing import echo
from .report import write_with_network

if TYPE_CHECKING:
    from ..classifier import Classifier


@click.command(
    short_help="Explain packaged photographs, offline.", epilog="\b\nExample:\n  undertow demo --out /tmp/look"
)
@click.option(
    "--out",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("undertow-demo"),
    show_default=True,
)
@device_option
def demo(out: Path, device: str) -> int:
    """Explain four packaged photographs with a packaged ImageNet classifier, offline, under all three rules.

    Records the gradients of its convolutions too, and ends with one HTML page of all of it.
    """
    from .. import images, models
    from ..attribution.photograph import ExplainedPhotograph, mean_correlation

    results: list[ExplainedPhotograph] = []
    options = {"rules": RULES, "target": "top:1"}
    photographs = list(images.demo_photographs().values())
    classifier = models.load("demo")
    code = explain_all(classifier, photographs, options, device, out, then=results.append)
    echo("How alike a rule's maps of the different photographs are (mean correlation; 1 is the same map):")
    for rule in RULES:
        maps = [explained.maps[rule].numpy() for explained in results]
        echo(f"  {rule:<10}{mean_correlation(maps):6.2f}")
    if results and not results[0].maps["deconvnet"].switches:
        echo("deconvnet's maps are alike because this network has no max-pooling: do not read them.")
    if results:
        _write_page(classifier, results, out)
    echo("\nNext, your own photograph:\n  undertow explain PHOTO.jpg --model demo --target top:3 --report photo.html")
    return code


def _write_page(classifier: "Classifier", results: "Sequence[Any]", out: Path) -> None:
    """Record the photographs' gradients, unless an earlier demo did, and write the page of maps and gradients."""
    from ..errors import FrameworkError

    run, device = out / "gradients", results[0].device
    try:
        if not (run / "manifest.json").is_file():
            _record(classifier, [explained.path for explained in results], run, device)
        folders = [folder for folder in sorted(out.iterdir()) if (folder / "result.json").is_file()]
        write_with_network([*folders, run], out / "report.html", classifier, results[0].path, device)
    except FrameworkError as error:
        echo(f"no page: {error}")


def _record(classifier: "Classifier", photographs: Sequence[Path], run: Path, device: str) -> None:
    from ..recording import record

    measures = ["histogram", "channel-norm"]
    with record(run, classifier.module, sites="conv", measures=measures, diagnose=1) as recording:
        for path in photographs:
            with recording.batch(samples=[path.name]):
                classifier.module(classifier.prepare(path, device)).max().backward()
