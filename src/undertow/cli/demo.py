"""`undertow demo`: the main job on packaged photographs and weights."""

from pathlib import Path

import click

from .explain import explain_all
from .photographs import RULES, device_option
from .printing import echo


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
    """Explain four packaged photographs with a packaged ImageNet classifier, offline, under all three rules."""
    from .. import images, models
    from ..attribution.photograph import ExplainedPhotograph, mean_correlation

    results: list[ExplainedPhotograph] = []
    options = {"rules": RULES, "target": "top:1"}
    photographs = list(images.demo_photographs().values())
    code = explain_all(models.load("demo"), photographs, options, device, out, then=results.append)
    echo("How alike a rule's maps of the different photographs are (mean correlation; 1 is the same map):")
    for rule in RULES:
        maps = [explained.maps[rule].numpy() for explained in results]
        echo(f"  {rule:<10}{mean_correlation(maps):6.2f}")
    if results and not results[0].maps["deconvnet"].switches:
        echo("deconvnet's maps are alike because this network has no max-pooling: do not read them.")
    echo("\nNext, your own photograph:\n  undertow explain PHOTO.jpg --model demo --target top:3")
    return code
