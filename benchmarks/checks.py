"""What it costs to trust nothing: reading a run with and without checks, recording with and without checksums.

    python benchmarks/checks.py

Prints ratios to the same work without them, each the median of rounds in which both take turns. Results:
benchmarks/checks.md.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet
import torch
from torch import nn

import undertow as ut
from undertow.recording import writer
from undertow.runs.format import schema

MEASURES = ["channel-norm", "zero-fraction", "histogram", "moments"]
ROUNDS = 15


def recorded(folder: str | Path, model: nn.Module, x: torch.Tensor, batches: int, group: int = 256) -> Path:
    """Record a loop of training steps; gradients only."""
    with ut.record(folder, model, sites="conv", measures=MEASURES, group=group) as recording:
        for _ in range(batches):
            with recording.batch(samples=[str(i) for i in range(len(x))]):
                model(x).square().mean().backward()
            model.zero_grad()
    return Path(folder)


def unchecked(run: ut.Run) -> None:
    """Read every part of every table as Arrow does, and nothing else."""
    for name in run.tables:
        fields = schema({**run.manifest["tables"]}[name]) if name in run.manifest["tables"] else None
        for part in run.parts(name):
            rows = pyarrow.parquet.ParquetFile(part).read()
            if fields is not None:
                rows.cast(fields)


def checked(folder: Path) -> None:
    """Read every part as the library does, checksums first."""
    run = ut.Run(folder)
    for name in run.tables:
        run.table(name)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def ratio(ours: Callable[[], object], baseline: Callable[[], object], rounds: int = ROUNDS) -> str:
    """Return the median ratio of two, and the middle half of the ratios."""
    ours(), baseline()
    ratios = [seconds(ours) / seconds(baseline) for _ in range(rounds)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def without_checksums(work: Callable[[], object]) -> Callable[[], object]:
    """Return the work with a writer that takes no checksums, and so writes no list of them."""

    def run() -> None:
        before = writer.sha256_of, writer.write_checksums
        writer.sha256_of, writer.write_checksums = (lambda path: ""), (lambda *_: None)  # type: ignore[assignment]
        try:
            with suppress(ut.RunError):  # at its end a recording misses the lists
                work()
        finally:
            writer.sha256_of, writer.write_checksums = before

    return run


def main() -> None:
    """Measure, and print the table."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()) for _ in range(8)))
    x = torch.randn(8, 16, 32, 32)
    print("| work | ratio to the same without |\n|---|--:|")
    with tempfile.TemporaryDirectory() as top:
        folder = recorded(f"{top}/read", model, x, 600)
        run = ut.Run(folder)
        size = f"{sum(path.stat().st_size for path in folder.rglob('*.parquet')) / 1e6:.0f} MB"
        print(f"| reading every table of {size} | {ratio(lambda: checked(folder), lambda: unchecked(run))} |")
        print(f"| `undertow check` of it, to reading it unchecked | {ratio(run.check, lambda: unchecked(run))} |")
        count = iter(range(1000))
        for group in (256, 16):

            def record(group: int = group) -> None:
                recorded(f"{top}/{next(count)}", model, x, 64, group)

            print(f"| a recorded training step, groups of {group} | {ratio(record, without_checksums(record), 7)} |")


if __name__ == "__main__":
    main()
