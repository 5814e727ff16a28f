"""How large are the gradients at six convolutions, how many of them are exactly zero, and where do the zeros arise?

    python studies/fashion_mnist.py --pool max --activation relu --epochs 3 --keep --out runs/max-relu --plot bars.png

Trains a small network on Fashion-MNIST and records, through the first batches of the last epoch alone,

    RUN           what each convolution's output receives: norms, moments, histograms and, with --keep, the tensors
    RUN-points    the share of zeros at each successive point, in the gradients and in the values themselves
    RUN-training  the weights after each epoch, from which the same line goes on when it was stopped

Whatever it prints and draws is read back from these folders. What came out: docs/studies/fashion_mnist.md
"""

import argparse
import gzip
import os
import sys
from collections import OrderedDict
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

import undertow as ut
from undertow.diagnosis import contrast, fit
from undertow.show import plots

QUANTILES = (0.5, 0.7, 0.9)
BOUND = 2**-8  # of a histogram's quantiles, relatively
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
PACKAGE = "dataset-fashion-mnist"
FILES = {"train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")}
FILES["test"] = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images, white being 1
WIDTHS = (16, 16, 16, 32, 32, 32)
OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": partial(torch.optim.SGD, momentum=0.9)}
POOLS = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}


class StudyError(Exception):
    """Something that the person who runs the study can put right."""


def find_data(folder: Path | None) -> Path:
    """Return the folder of the four files: the one given, Debian's, or one that torchvision downloads into.

    Raises:
        StudyError: there is none.
    """
    missing = [name for pair in FILES.values() for name in pair if not ((folder or DEBIAN) / name).is_file()]
    if not missing:
        return folder or DEBIAN
    if folder:
        raise StudyError(f"{folder} lacks {missing[0]}; --data takes the folder of Fashion-MNIST's four .gz files")
    root = Path.home() / ".cache" / "undertow"
    try:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(root, download=True)
    except Exception as error:  # no network, no torchvision, one that does not fit: the remedies are the same
        raise StudyError(
            f"Fashion-MNIST is not here: run `apt-get install {PACKAGE}`, or pass --data FOLDER with its four .gz "
            f"files (torchvision's download failed: {' '.join(str(error).split())})"
        ) from error
    return root / "FashionMNIST" / "raw"


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped idx file of bytes: two zeros, the type, the number of axes, the size of each, the data.

    Raises:
        StudyError: it is no such file.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise StudyError(f"{path} cannot be read ({error}); take it from {PACKAGE} again") from error
    shape = np.frombuffer(raw, ">i4", raw[3], 4) if len(raw) > 3 and len(raw) >= 4 + 4 * raw[3] else np.zeros(0, int)
    if raw[:3] != b"\0\0\x08" or len(raw) != 4 + 4 * len(shape) + int(np.prod(shape)):
        raise StudyError(f"{path} is no whole idx file of bytes; take it from {PACKAGE} again")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def load_split(folder: Path, split: str, limit: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images, float32 (N, 1, 28, 28) with mean 0 and deviation 1 over the training set, and labels, (N,)."""
    images, labels = (torch.from_numpy(read_idx(folder / name)[:limit].copy()) for name in FILES[split])
    return (images.unsqueeze(1).float() / 255 - MEAN) / STD, labels.long()


def network(kind: str = "conv", pool: str = "max", activation: str = "relu", seed: int = 0) -> nn.Sequential:
    """Build six convolutions with pooling after the third and the sixth, or six linear layers."""
    torch.manual_seed(seed)
    slope = float(activation.partition(":")[2] or 0)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if kind == "linear":
        layers["flatten"] = nn.Flatten()
        sizes = (784, *[32] * 5, 10)
        for number, (before, after) in enumerate(pairwise(sizes), 1):
            layers[f"linear{number}"] = nn.Linear(before, after)
            if number < 6:
                layers[f"act{number}"] = _activation(slope)
    else:
        for number, (before, after) in enumerate(pairwise((1, *WIDTHS)), 1):
            layers[f"conv{number}"] = nn.Conv2d(before, after, 3, padding=1)
            layers[f"act{number}"] = _activation(slope)
            if number in (3, 6):
                layers[f"pool{number}"] = POOLS[pool](2)
        layers |= {"flatten": nn.Flatten(), "head": nn.Linear(WIDTHS[-1] * 7 * 7, 10)}
    for module in layers.values():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, a=slope)
            nn.init.zeros_(module.bias)
    return nn.Sequential(layers)


def _activation(slope: float) -> nn.Module:
    return nn.LeakyReLU(slope) if slope else nn.ReLU()


def beside(out: Path, what: str) -> Path:
    return out.with_name(f"{out.name}-{what}")


def is_finished(folder: Path) -> bool:
    return (folder / "manifest.json").is_file() and ut.Run(folder).finished


def recordings(args: argparse.Namespace, model: nn.Module) -> list[Any]:
    """Return the recordings that are still to be made or resumed."""
    measures = ["zero-fraction", "moments", "histogram", "channel-norm", *(["keep"] if args.keep else [])]
    points = "linear, relu" if args.network == "linear" else "conv, relu, pool"
    settings = {
        beside(args.out, "points"): {"sites": points, "measures": "zero-fraction", "phase": "both"},
        args.out: {"sites": args.network, "measures": measures, "diagnose": 8},
    }
    shared = {
        "schedule": ut.Schedule(epoch=-1, first=args.batches, epochs=args.epochs),
        "objective": f"cross-entropy, mean over a batch of {args.batch_size}",
        "reference": label(args),
    }
    return [ut.record(folder, model, **own, **shared) for folder, own in settings.items() if not is_finished(folder)]


def label(args: argparse.Namespace) -> str:
    return ", ".join(["linear", args.activation] if args.network == "linear" else [args.pool, args.activation])


def train(args: argparse.Namespace) -> float:
    """Train the network, record its gradients, and return the share of test images that it classifies correctly."""
    folder = find_data(args.data)
    x, y = load_split(folder, "train", args.limit)
    model = network(args.network, args.pool, args.activation, args.seed).to(args.device)
    optimizer = OPTIMIZERS[args.optimizer](model.parameters(), args.lr)
    checkpoint = Checkpoint(args)
    begin = checkpoint.restore(model, optimizer)
    with ExitStack() as stack:
        unfinished = [stack.enter_context(recording) for recording in recordings(args, model)]
        progress = stack.enter_context(bar())
        task = progress.add_task(label(args), total=len(x) * args.epochs, completed=len(x) * begin, speed="")
        for epoch in range(begin, args.epochs):
            # an order that depends on nothing but seed and epoch, so that a resumed run sees the same batches
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1000 * args.seed + epoch))
            for number, chosen in enumerate(order.split(args.batch_size)):
                names = [f"train/{index:05d}" for index in chosen.tolist()]
                optimizer.zero_grad()
                with ExitStack() as batch:
                    for recording in unfinished:
                        batch.enter_context(recording.batch(names, epoch=epoch, batch=number))
                    scores = model(x[chosen].to(args.device))
                    nn.functional.cross_entropy(scores, y[chosen].to(args.device)).backward()
                optimizer.step()
                advance(progress, task, len(chosen))
            for recording in unfinished:
                recording.flush()
            checkpoint.save(epoch + 1, model, optimizer)
    correct = accuracy(model, *load_split(folder, "test", args.limit), args.device)
    checkpoint.save(args.epochs, model, optimizer, correct)
    return correct


def bar() -> Progress:
    columns = (BarColumn(), TextColumn("{task.percentage:3.0f} % {task.fields[speed]}"), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True))


def advance(progress: Progress, task: Any, images: int) -> None:
    speed = progress.tasks[task].speed
    progress.update(task, advance=images, speed=f"{speed:,.0f} images/s" if speed else "")


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor, device: str = "cpu") -> float:
    model.eval()
    right = [(model(a.to(device)).argmax(1).cpu() == b).sum() for a, b in zip(x.split(500), y.split(500), strict=True)]
    return int(sum(right)) / len(y)


class Checkpoint:
    """The weights after the last whole epoch, beside the run, with the settings that they belong to."""

    SETTINGS = (
        "network",
        "pool",
        "activation",
        "epochs",
        "batch_size",
        "optimizer",
        "lr",
        "seed",
        "limit",
        "batches",
        "keep",
    )

    def __init__(self, args: argparse.Namespace) -> None:
        self.path = beside(args.out, "training") / "checkpoint.pt"
        self.settings = {key: getattr(args, key) for key in self.SETTINGS}
        self.held = torch.load(self.path, weights_only=True) if self.path.is_file() else {}
        for key, before in self.held.get("settings", {}).items():
            if before != self.settings[key]:
                raise StudyError(f"{args.out} has {key} {before!r}, not {self.settings[key]!r}; choose another --out")

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Take up weights and optimiser, and return how many epochs they have seen."""
        if not self.held:
            return 0
        model.load_state_dict(self.held["model"])
        optimizer.load_state_dict(self.held["optimizer"])
        return int(self.held["epochs"])

    def save(
        self, epochs: int, model: nn.Module, optimizer: torch.optim.Optimizer, correct: float | None = None
    ) -> None:
        self.held = {"settings": self.settings, "epochs": epochs, "accuracy": correct}
        self.held |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".aside")
        torch.save(self.held, aside)
        os.replace(aside, self.path)


def table(heads: list[str], rows: list[list[Any]]) -> str:
    """Format a Markdown table."""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def number(value: float) -> str:
    return "0" if value == 0 else f"{value:.3g}"


def quantile_table(rows: list[Any]) -> str:
    body = [[row.site, *map(number, row.values), f"{row.zeros / row.count:.4f}"] for row in rows]
    return table(["output of", *(f"{100 * q:g} %" for q in QUANTILES), "zeros"], body)


def zero_fractions(run: Any) -> dict[tuple[str, str], float]:
    """Return the share of zeros for each (site, phase)."""
    sums = run.table("zero_fraction").group_by(["site", "phase"]).aggregate([("zeros", "sum"), ("total", "sum")])
    return {(row["site"], row["phase"]): row["zeros_sum"] / row["total_sum"] for row in sums.to_pylist()}


def points_table(run: Any) -> str:
    zeros = zero_fractions(run)
    body = [[site, *(f"{zeros[site, phase]:.4f}" for phase in ("backward", "forward"))] for site in run.sites]
    return table(["output of", "zeros in its gradient", "zeros in its values"], body)


def findings(run: Any) -> str:
    lines = (f"- {finding.severity}, {finding.cause}: {finding.sentence}" for finding in ut.diagnose(run))
    return "\n".join(lines) or "- nothing found"


def decay(run: Any) -> str:
    """Word how the gradient changes with depth, where enough of it is there."""
    sizes = ut.diagnosis.sizes(run)
    if len(sizes) < 4:
        return "- depth: no gradient at too many layers"
    line = fit(np.log2(list(sizes.values())))
    factor, low, high = (2.0**-slope for slope in (line.slope, line.high, line.low))
    ends = [number(sizes[site]) for site in (list(sizes)[-1], next(iter(sizes)))]
    between = f"from {ends[0]} to {ends[1]} (median of |g| where it is not zero)"
    return f"- depth: {between}, by {factor:.3g} a layer towards the input (95 % interval {low:.3g} to {high:.3g})"


def greatest_difference(run: Any, rows: list[Any]) -> float:
    """Return by how much the histograms' quantiles differ from those of the kept tensors, relatively, at most."""
    worst = 0.0
    for row in rows:
        values = np.concatenate([np.abs(tensor).ravel() for _, tensor in run.tensors(site=row.site)])
        exact = np.quantile(values, row.q, method="inverted_cdf")
        for a, b in zip(row.values, exact.tolist(), strict=True):
            worst = max(worst, 0.0 if a == b else abs(a - b) / b if b else float("inf"))
    return worst


def report(args: argparse.Namespace, correct: float) -> int:
    """Print and draw what the folders hold; return the exit code."""
    run = ut.Run(args.out)
    rows = run.quantiles(QUANTILES, of="magnitude")
    print(f"{label(args)}: {100 * correct:.2f} % of the test images are classified correctly\n")
    batches = run.table("batches").num_rows
    print(f"Quantiles of |gradient of the mean loss|, {batches} batches of the last of {args.epochs} epochs\n")
    print(quantile_table(rows) + "\n")
    print("Zeros at successive points, from the input to the scores\n")
    print(points_table(ut.Run(beside(args.out, "points"))) + "\n")
    print("What a diagnosis says\n")
    print(findings(run) + "\n" + decay(run) + "\n")
    for other in map(ut.Run, args.beside):
        sentences = contrast([run, other])
        print(
            f"Beside {other.manifest['model']['reference']}\n\n" + "\n".join(f"- {line}" for line in sentences) + "\n"
        )
    if args.plot:
        others = {other.manifest["model"]["reference"]: other for other in map(ut.Run, args.beside)}
        groups = {label(args): rows} | {name: other.quantiles(QUANTILES) for name, other in others.items()}
        figure = plots.quantile_panels(groups, title="|gradient| at each layer's output, Fashion-MNIST")
        plots.save(figure, args.plot)
        print(f"Drawn: {args.plot}\n")
    if not args.keep:
        return 0
    worst = greatest_difference(run, rows)
    word = "agree" if worst <= BOUND else "DISAGREE"
    print(f"Quantiles of {run.table('kept').num_rows} kept tensors and of the histograms {word}: ", end="")
    print(f"they differ by {worst:.5f} at most, relatively; the bound is {BOUND:.5f}")
    return int(worst > BOUND)


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="the folder; begun or gone on with")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="with Fashion-MNIST's four .gz files")
    parser.add_argument("--network", choices=("conv", "linear"), default="conv")
    parser.add_argument("--pool", choices=tuple(POOLS), default="max")
    parser.add_argument("--activation", default="relu", metavar="relu|leaky:0.1", type=_known_activation)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="adam", help="sgd has momentum 0.9")
    parser.add_argument("--lr", type=float, default=1e-3, help="%(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N images alone")
    parser.add_argument("--batches", type=int, default=50, metavar="N", help="of the last epoch to record; %(default)s")
    parser.add_argument("--keep", action="store_true", help="keep the gradients themselves: some 14 MB a batch")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a panel for each quantile, .png, .svg or .pdf")
    parser.add_argument("--beside", type=Path, nargs="*", default=[], metavar="RUN", help="runs to draw with it")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(words)
    for name in ("epochs", "batch_size", "batches", "limit", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    return args


def _known_activation(word: str) -> str:
    kind, _, slope = word.partition(":")
    if word != "relu" and not (kind == "leaky" and 0 < float(slope) < 1):
        raise argparse.ArgumentTypeError(f"{word!r} is neither relu nor leaky:SLOPE with a slope between 0 and 1")
    return word


def main(words: list[str] | None = None) -> int:
    args = arguments(words)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        done = is_finished(args.out) and is_finished(beside(args.out, "points"))
        correct = Checkpoint(args).held.get("accuracy") if done else None
        return report(args, train(args) if correct is None else correct)
    except (StudyError, ut.UndertowError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same line goes on from the last whole epoch", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
