"""What the commands share that go over a whole data set: options, the summary; and `undertow status`."""

import os
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .photographs import input_line, json_option
from .printing import echo, echo_error, print_json
from .progress import clock, progress

if TYPE_CHECKING:
    from ..classifier import Classifier
    from ..sweep import Sweep, SweepStatus

AT_ONCE = 12
"""So many photographs at most are explained one by one, each into a folder of pictures."""
_SHOWN = 10  # failures that are printed


class _CountOrAuto(click.IntRange):
    """A number of at least 1, or `auto`."""

    def __init__(self) -> None:
        super().__init__(1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number, or the word. Raises BadParameter: it is neither."""
        return value if value == "auto" else super().convert(value, param, ctx)


_count = partial(click.option, metavar="N", type=click.IntRange(1))
_OPTIONS = {
    "engine": click.option(
        "--engine",
        type=click.Choice(("local", "torchrun", "ray")),
        help="Sweep over the data set, resumably: in this process, in those of torchrun, or on Ray.",
    ),
    "batch_size": click.option(
        "--batch-size",
        metavar="N|auto",
        type=_CountOrAuto(),
        help="Of a sweep: images at once; auto: as fit into memory. Default: 8 on a CPU, 32 elsewhere.",
    ),
    "workers": _count("--workers", help="Of a sweep: threads that read. Default: as many as processors, 2 to 8."),
    "shard_size": _count("--shard-size", help="Of a sweep: images that are published together. Default: 64."),
    "max_failures": click.option(
        "--max-failures",
        metavar="N",
        type=click.IntRange(0),
        help="Of a sweep: more failures end it, resumably. Default: a tenth, and at least 10.",
    ),
    "limit": _count("--limit", help="Of a sweep: the first N images alone."),
    "fast": click.option(
        "--fast",
        type=click.Choice(("auto", "off")),
        help="Of a sweep of maps: prepare the network where that measures quicker here (default), or use it as it is.",
    ),
    "draft": click.option("--draft", is_flag=True, help="Of a sweep: read large JPEGs reduced; quicker, not the same."),
    "address": click.option("--address", metavar="HOST:PORT", help="Of Ray: a running cluster, or auto."),
    "processes": _count("--processes", help="Of Ray: workers. Default: one a GPU, or one for two processors."),
}


def sweep_options(*others: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return what adds the options of a sweep to a command, but for those that it has already."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for name, option in reversed(_OPTIONS.items()):
            command = command if name in others else option(command)
        return command

    return add


def split_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of a sweep that were given, and all others."""
    how = {name: options[name] for name in _OPTIONS if options.get(name) not in (None, False)}
    return how, {name: value for name, value in options.items() if name not in _OPTIONS}


def run_sweep(
    verb: Callable[..., "Sweep"],
    classifier: "Classifier",
    source: Any,
    out: Path,
    *,
    load: Callable[[], "Classifier"],
    as_json: bool,
    **options: Any,
) -> int:
    """Sweep, with a bar; print how it ended, and return the exit code: 2 where items failed.

    Under torchrun that is 0 all the same, since another code would end the other processes; rank 0 alone prints.
    """
    others = options.get("engine") == "torchrun"
    silent = others and os.environ.get("RANK", "0") != "0"
    started = time.monotonic()
    with progress(silent) as bar:
        swept = verb(source, classifier, out, advance=bar.advance, begin=bar.begin, load=load, **options)
    if silent:
        return 0
    status = swept.status()
    if as_json:
        print_json({**status.to_dict(), "seconds": round(time.monotonic() - started, 3)})
    else:
        print_status(status, input_line(classifier))
        for line in swept.prepared:
            echo(f"  prepared: {line}")
        print_next(status)
    return 2 if status.failed and not others else 0


def print_status(status: "SweepStatus", of_input: str = "") -> None:
    """Print how far a sweep is, and which items failed."""
    for failure in status.failures[:_SHOWN]:
        echo_error(failure.error if failure.name in failure.error else f"{failure.name}: {failure.error}")
    if status.failed > _SHOWN:
        echo(f"... and {status.failed - _SHOWN} more; all of them: undertow status {status.sweep} --json", err=True)
    state = "finished" if status.finished else f"{status.missing} missing"
    failed = f", {status.failed} failed" if status.failed else ""
    what = f"{status.task} of {status.count} images with {status.model}"
    echo(f"{status.sweep}: {what}: {status.done} done{failed}, {state}")
    speed = f"  {status.speed:.1f} images/s" if status.speed else ""
    left = f", {clock(status.seconds_left)} left" if status.seconds_left else ""
    if speed and not status.finished:
        echo(f"{speed}{left}; the same command goes on where it stopped")
    elif speed:
        echo(speed)
    if of_input:
        echo(f"  {of_input}\n  -> {status.sweep}")


def print_next(status: "SweepStatus") -> None:
    """Print what can be done with a sweep that is finished."""
    if not status.finished:
        return
    if status.task == "record":
        echo(f"Next: undertow quantiles {status.sweep}")
    elif status.task == "explain":
        echo(
            f"Next, in Python: ut.Sweep({status.sweep!r}).map(NAME); with pictures: the same command with --pictures N"
        )


@click.command(
    short_help="How far a sweep or a recording is.",
    epilog="\b\nExamples:\n  undertow status maps\n  undertow status runs/vgg16 --json\n\n"
    "The exit code is 0 if RUN is finished, and 2 if something is missing.",
)
@click.argument("run", type=click.Path(path_type=Path))
@json_option(help="Print one JSON object instead of lines.")
def status(run: Path, as_json: bool) -> int:
    """Print how much of RUN is done, what is missing, what failed and why, how fast it goes, and the time left.

    RUN is the folder of a sweep (`undertow explain` of many photographs, or with --engine) or of a recording. It may be
    asked of while it goes on.
    """
    from ..sweep import Sweep

    if not is_sweep(run):
        return _status_of_run(run, as_json)
    told = Sweep(run).status()
    if as_json:
        print_json(told.to_dict())
    else:
        print_status(told)
    return 0 if told.finished else 2


def is_many(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a file of many photographs: a list, a Parquet column or a tar file.

    >>> is_many("a/b.tar"), is_many("x.parquet:image"), is_many("cat.jpg")
    (True, True, False)
    """
    return re.search(r"\.(txt|tar|tar\.gz|tgz)$|\.parquet:[^/\\:]+$", os.fspath(path), re.IGNORECASE) is not None


def is_sweep(folder: Path) -> bool:
    """Whether a folder says that it is a sweep's."""
    return os.path.lexists(folder / "sweep.json")


def _status_of_run(folder: Path, as_json: bool) -> int:
    from ..runs import Run

    run = Run(folder)
    batches = run.table("batches").num_rows
    if as_json:
        print_json({"run": str(folder), "finished": run.finished, "batches": batches})
    else:
        state = "finished" if run.finished else "not finished: recording again with the same settings goes on with it"
        echo(f"{folder}: {batches} batches recorded, {state}")
    return 0 if run.finished else 2


def all_of(sources: Sequence[Path]) -> Any:
    """Return what a sweep takes for the words of a command: one, or several."""
    words = [str(path) for path in sources]
    return words[0] if len(words) == 1 else words
