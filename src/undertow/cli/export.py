"""`undertow export`: a run, or maps, to an experiment tracker."""

from pathlib import Path

import click

from .photographs import json_option
from .printing import echo, print_json
from .progress import progress

TO = (
    "tensorboard",
    "wandb",
    "mlflow",
    "csv",
    "npz",
)  # those of `undertow.trackers.sending`, which takes long to import


@click.command(
    short_help="To TensorBoard, W&B, MLflow, CSV or NumPy.",
    epilog="\b\nExamples:\n  undertow export runs/a --to tensorboard           then: tensorboard --logdir runs\n"
    "  undertow export runs/a --to wandb --project nets  offline where WANDB_MODE=offline\n"
    "  undertow export runs/a --to mlflow --out http://localhost:5000\n"
    "  undertow export runs/a --to csv --every 100 --out tables\n"
    "  undertow export runs/a --to tensorboard --follow  while it is being recorded\n"
    "  undertow export undertow-out --to tensorboard     maps as images\n\n"
    "The same command again sends what is new since.",
)
@click.argument("what", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(TO), required=True, help="The tracker, or the kind of file.")
@click.option(
    "-o", "--out", metavar="FOLDER", help="The tracker's folder; of mlflow also an address. Default: WHAT-TO."
)
@click.option(
    "--every", metavar="N", type=click.IntRange(1), default=1, show_default=True, help="Every so many batches."
)
@click.option("--project", default="undertow", show_default=True, help="Of W&B; the experiment of MLflow.")
@click.option("--follow", is_flag=True, help="Go on until the run is finished.")
@json_option(help="Print one JSON object instead of a line.")
def export(what: Path, to: str, out: str | None, every: int, project: str, follow: bool, as_json: bool) -> int:
    """Send WHAT, the folder of a run, of explained photographs or of a sweep, to an experiment tracker.

    Of a run: norms, zero fractions, moments, quantiles and optimizers' rates as scalars, histograms cell by cell as
    they were counted, findings as texts. Of explained photographs: maps as images, verdicts as texts.
    """
    from ..trackers.export import export as export_to

    with progress(as_json, "parts", "parts") as bar:
        begun = 0

        def told(done: int, count: int) -> None:
            nonlocal begun
            if done == 1:
                bar.begin(0, count)
                begun = 0
            bar.advance(done - begun)
            begun = done

        sent = export_to(what, to, out, every=every, project=project, follow=follow, progress=told)
    if as_json:
        print_json(sent.to_dict())
        return 0
    before = f"; {sent.before} parts were there already" if sent.before else ""
    echo(f"{sent.entries} entries of {sent.portions} parts to {sent.out}{before}")
    if to == "tensorboard":
        echo(f"look: tensorboard --logdir {sent.out}")
    return 0
