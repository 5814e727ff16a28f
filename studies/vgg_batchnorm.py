"""Does batch normalisation narrow the gradients at the first two convolutions of a VGG16?

    python studies/vgg_batchnorm.py --out vgg                                    # torchvision's ImageNet weights
    python studies/vgg_batchnorm.py --out vgg --weights vgg16.pth --weights-bn vgg16_bn.pth
    python studies/vgg_batchnorm.py --networks fashion-mnist --train-epochs 3 --out vgg    # where neither can be had

Shows 250 photographs to VGG16 and VGG16-BN, records for each image and channel the norm of the gradient of the
predicted class's score, and compares the quantiles. The photographs are crops of ten that scikit-image brings, unless
--photographs names a folder. With `--networks fashion-mnist` the networks are VGG16 at a quarter of its width, trained
here; they are also shown 250 test images of Fashion-MNIST, which they know, and the first batches of their training
are recorded too. What came out: docs/studies/vgg_batchnorm.md. Source of the question: arXiv 1806.02375
"""

import argparse
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fashion_mnist import MEAN, STD, StudyError, accuracy, advance, bar, find_data, is_finished, load_split, table
from fashion_mnist import number as digits
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import undertow as ut
from undertow import images, models
from undertow.runs.compare import same_class
from undertow.show import plots

BLOCKS = (2, 2, 3, 3, 3)  # convolutions between VGG16's poolings
SHOWN = (0.05, 0.25, 0.5, 0.75, 0.95)
STEPS = tuple(step / 100 for step in range(5, 100, 5))
PACKAGED = ("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png")
PACKAGED += ("coins.png", "grass.png", "gravel.png", "motorcycle_left.png", "rocket.jpg")
GRID, SIDE = 5, 160
NAMES = ("vgg16", "vgg16_bn")
CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SEEN = {"class": "int32", "class_name": "string", "score": "float64"}  # what `undertow record` adds to each image


@dataclass(frozen=True)
class Network:
    """A network in evaluation mode, and how a photograph becomes its input."""

    name: str
    module: nn.Module
    load_photograph: Callable[[Path], torch.Tensor]
    description: str
    classes: Sequence[str]


@dataclass(frozen=True)
class Images:
    """Named images, read when they are asked for."""

    title: str
    names: Sequence[str]
    load: Callable[[Network, str], torch.Tensor]


def cut_crops(folder: Path) -> Path:
    """Cut 25 squares of 160 x 160 pixels from each packaged photograph, once; named after photograph and position.

    Raises:
        StudyError: a photograph is not where scikit-image has it.
    """
    source = images.demo_photographs()["chelsea"].parent
    for photograph in PACKAGED:
        if not (source / photograph).is_file():
            raise StudyError(f"scikit-image has no {photograph}; install the version in constraints.txt")
        whole = images.read(source / photograph)
        fractions = np.linspace(0, 1, GRID)
        for top in ((whole.height - SIDE) * fractions).astype(int).tolist():
            for left in ((whole.width - SIDE) * fractions).astype(int).tolist():
                path = folder / Path(photograph).stem / f"{Path(photograph).stem}-y{top:04d}-x{left:04d}.png"
                if not path.is_file():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    whole.crop((left, top, left + SIDE, top + SIDE)).save(path.with_suffix(".aside"), "PNG")
                    os.replace(path.with_suffix(".aside"), path)
    return folder


def photographs(folder: Path, limit: int | None) -> Images:
    names = [str(path.relative_to(folder)) for path in images.find([folder])]
    chosen = names if limit is None else names[:: max(1, len(names) // limit)][:limit]
    return Images("photographs", chosen, lambda network, name: network.load_photograph(folder / name))


def fashion_images(data: Path, limit: int) -> Images:
    x, _ = padded(data, "test", limit)
    names = [f"test/{index:05d}" for index in range(len(x))]
    return Images("fashion-mnist", names, lambda _, name: x[int(name[-5:])])


def grey(path: Path) -> torch.Tensor:
    """Return a photograph as the small networks see images: grey, 28 x 28, two pixels of black around it."""
    small = images.read(path).convert("L").resize((28, 28), Image.Resampling.LANCZOS)
    return torch.from_numpy((np.pad(np.asarray(small, np.float32), 2) / 255 - MEAN) / STD).unsqueeze(0)


def imagenet_networks(args: argparse.Namespace) -> Iterator[Network]:
    for name, weights in zip(NAMES, (args.weights, args.weights_bn), strict=True):
        try:
            classifier = models.load(f"torchvision:{name}", weights)
        except ut.ModelError as error:
            remedy = "pass --weights FILE --weights-bn FILE, or train small ones here: --networks fashion-mnist"
            raise StudyError(f"{error}; {remedy}") from error
        description = f"{classifier.reference}, {classifier.weights}, sha256 {classifier.weights_sha256[:16]}"
        loader = _photograph_loader(classifier.preprocessing)
        yield Network(name, classifier.module, loader, description, classifier.classes)


def _photograph_loader(preprocessing: images.Preprocessing) -> Callable[[Path], torch.Tensor]:
    return lambda path: torch.from_numpy(preprocessing.array(images.read(path)))


def small_vgg(batch_norm: bool, width: int = 16, seed: int = 0) -> nn.Sequential:
    """Build VGG16's thirteen convolutions for (B, 1, 32, 32), `width` channels instead of 64, one linear layer behind.

    Its `features` are numbered as torchvision numbers them.
    """
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    before = 1
    for block, length in enumerate(BLOCKS):
        after = width * min(2**block, 8)
        for _ in range(length):
            layers.append(nn.Conv2d(before, after, 3, padding=1))
            nn.init.kaiming_normal_(layers[-1].weight, nonlinearity="relu")
            nn.init.zeros_(layers[-1].bias)
            layers += [nn.BatchNorm2d(after), nn.ReLU(inplace=True)] if batch_norm else [nn.ReLU(inplace=True)]
            before = after
        layers.append(nn.MaxPool2d(2))
    parts = {"features": nn.Sequential(*layers), "flatten": nn.Flatten(), "classifier": nn.Linear(before, 10)}
    return nn.Sequential(OrderedDict(parts))


def fashion_networks(args: argparse.Namespace, data: Path) -> Iterator[Network]:
    for name in NAMES:
        module = small_vgg(name == "vgg16_bn", args.width, args.seed)
        file = args.out / f"{name}.safetensors"
        settings = {key: str(getattr(args, key)) for key in ("width", "seed", "train_epochs", "limit", "lr", "early")}
        if not file.is_file():
            train(args, name, module, data)
            correct = accuracy(module, *padded(data, "test", args.limit))
            keep(file, module, settings | {"accuracy": f"{correct:.4f}"})
        with safe_open(file, "pt") as held:
            metadata = held.metadata()
            for key, value in settings.items():
                if metadata[key] != value:
                    raise StudyError(f"{file} was made with {key} {metadata[key]}, not {value}; choose another --out")
            module.load_state_dict({key: held.get_tensor(key) for key in held.keys()})  # noqa: SIM118
        description = f"{100 * float(metadata['accuracy']):.2f} % of the test images are classified correctly"
        yield Network(name, module.eval(), grey, description, CLOTHES)


def padded(data: Path, split: str, limit: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (N, 1, 32, 32), with two pixels of black around each, and their labels."""
    x, y = load_split(data, split, limit)
    return nn.functional.pad(x, (2, 2, 2, 2), value=-MEAN / STD), y


def keep(file: Path, module: nn.Module, settings: dict[str, str]) -> None:
    aside = file.with_suffix(".aside")
    save_file(module.state_dict(), aside, settings)
    os.replace(aside, file)


def train(args: argparse.Namespace, name: str, module: nn.Module, data: Path) -> None:
    """Train a small network, and record the first batches of it, in training mode: the mean loss's gradients."""
    x, y = padded(data, "train", args.limit)
    optimizer = torch.optim.Adam(module.parameters(), args.lr)
    with ExitStack() as stack:
        recording = begun(args.out / f"training-{name}", module, stack, schedule=ut.Schedule(epoch=0, first=args.early))
        progress = stack.enter_context(bar())
        task = progress.add_task(f"train {name}", total=len(x) * args.train_epochs, speed="")
        for epoch in range(args.train_epochs):
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1000 * args.seed + epoch))
            for number, chosen in enumerate(order.split(64)):
                names = [f"train/{index:05d}" for index in chosen.tolist()]
                optimizer.zero_grad()
                with recording.batch(names, epoch=epoch, batch=number) if recording else nullcontext():
                    nn.functional.cross_entropy(module(x[chosen]), y[chosen]).backward()
                optimizer.step()
                advance(progress, task, len(chosen))


def begun(
    folder: Path, module: nn.Module, stack: ExitStack, columns: Mapping[str, str] | None = None, **settings: Any
) -> Any:
    """Begin a recording of the first two convolutions, or go on with it; None where it is finished."""
    if is_finished(folder):
        return None
    recording = ut.record(folder, module, sites="conv[:2]", measures="channel-norm", **settings)
    recording.sample_columns = dict(columns or {})
    return stack.enter_context(recording)


def refuse_other(folder: Path, network: Network, shown: Images) -> None:
    """Check that a finished run is of this network and these images.

    Raises:
        StudyError: it is not.
    """
    if is_finished(folder):
        run = ut.Run(folder)
        same = {
            "another network": run.manifest["model"]["reference"] == network.description,
            "other images": run.table("samples")["name"].to_pylist() == list(shown.names),
        }
        for difference, equal in same.items():
            if not equal:
                raise StudyError(f"{folder} is a run of {difference}; choose another --out")


def show(network: Network, shown: Images, folder: Path, size: int) -> Path:
    """Record, for each image, the gradients of the predicted class's score; batched, since the sum keeps them apart."""
    settings = {"loss_reduction": "sum", "objective": "predicted", "reference": network.description}
    refuse_other(folder, network, shown)
    network.module.requires_grad_(False)  # nobody asks for the weights' gradients here
    start, done = time.perf_counter(), 0
    with ExitStack() as stack:
        recording = begun(folder, network.module, stack, SEEN, **settings)
        for number, first in enumerate(range(0, len(shown.names), size) if recording else ()):
            names = shown.names[first : first + size]
            with recording.batch(names, batch=number) as wanted:
                if wanted:
                    x = torch.stack([shown.load(network, name) for name in names]).requires_grad_()
                    scores, ids = network.module(x).max(1)
                    scores.sum().backward()
                    seen = [network.classes[i] for i in ids.tolist()]
                    recording.describe({"class": ids.tolist(), "class_name": seen, "score": scores.tolist()})
                    done += len(names)
    if done:
        speed = done / (time.perf_counter() - start)
        print(f"{network.name}: {done} {shown.title} recorded, {speed:.1f} images/s", file=sys.stderr)
    return folder


def quantile_table(folders: Sequence[Path]) -> str:
    """Compare the channel norms of two runs: quantiles, then those of the second over those of the first."""
    heads = ["", *(f"{100 * q:g} %" for q in SHOWN), "95 % / 5 %", "95 % / 50 %", "zeros"]
    body: list[list[Any]] = []
    for row in ut.compare([ut.Run(folder) for folder in folders], SHOWN, of="channel_norm"):
        for name, quantiles, spread in zip(NAMES, row.quantiles, row.spreads, strict=True):
            upper = quantiles.values[-1] / quantiles.values[2] if quantiles.values[2] else float("inf")
            ends = [digits(spread), digits(upper), f"{quantiles.zeros / quantiles.count:.4f}"]
            body.append([f"convolution {row.place + 1}, {name}", *map(digits, quantiles.values), *ends])
        body.append(["ratio", *map(digits, row.ratios[1]), "", "", ""])
    return table(heads, body)


def spread_table(folders: Sequence[Path], networks: Sequence[Network] = ()) -> str:
    """Tell apart how much the norms vary from image to image, and from channel to channel: 95 % over 5 %.

    Batch norm divides each channel by its deviation, and so its gradient. Given the networks, in evaluation mode, a
    further row has the gradients of the values so divided: those of the recorded ones times the deviation.
    """
    body = []
    for position in range(2):
        for i, (name, folder) in enumerate(zip(NAMES, folders, strict=True)):
            run = ut.Run(folder)
            rows = run.table("channel_norm").to_pylist()
            norms = np.array([row["values"] for row in rows if row["site"] == run.sites[position]])
            body.append([f"convolution {position + 1}, {name}", *spreads(norms)])
            divided = deviations(networks[i].module, run.sites[position]) if networks else None
            if divided is not None:
                body.append([f"convolution {position + 1}, {name}, times deviation", *spreads(norms * divided)])
    return table(["95 % / 5 %", "of all norms", "of the images' medians", "of the channels' medians"], body)


def spreads(norms: np.ndarray) -> list[str]:
    """Return 95 % over 5 % of norms (images, channels), of each image's median and of each channel's."""
    groups = (norms, np.median(norms, 1), np.median(norms, 0))
    ends = [np.quantile(values, (0.05, 0.95), method="inverted_cdf").tolist() for values in groups]
    return [digits(high / low) if low else "inf" for low, high in ends]


def deviations(module: nn.Module, site: str) -> np.ndarray | None:
    """Return by what the batch norm behind a convolution divides each channel, or None where there is none."""
    parent, _, index = site.rpartition(".")
    following = module.get_submodule(f"{parent}.{int(index) + 1}")
    return (following.running_var + following.eps).sqrt().numpy() if isinstance(following, nn.BatchNorm2d) else None


def report(title: str, folders: Sequence[Path], plot: Path | None, networks: Sequence[Network] = ()) -> None:
    print(f"{title}: l2 norm of each channel's gradient\n")
    print(f"{quantile_table(folders)}\n\n{spread_table(folders, networks)}\n")
    if shared := same_class(*map(ut.Run, folders)):
        print(f"{shared}\n")
    if plot:
        rows = [ut.Run(folder).quantiles(STEPS, of="channel_norm") for folder in folders]
        groups = dict(zip(NAMES, rows, strict=True))
        plots.save(plots.quantile_panels(groups, f"The first two convolutions: {title}", panels="layer"), plot)
        print(f"Drawn: {plot}\n")


def study(args: argparse.Namespace) -> None:
    data = find_data(args.data) if args.networks == "fashion-mnist" else None
    networks = list(imagenet_networks(args) if data is None else fashion_networks(args, data))
    sets = [photographs(args.photographs or cut_crops(args.out / "photographs"), args.limit_images)]
    if data:
        sets.append(fashion_images(data, args.limit_images or 250))
    for network in networks:
        print(f"{network.name}: {network.description}")
    print()
    for shown in sets:
        folders = [
            show(network, shown, args.out / f"{shown.title}-{network.name}", args.batch_size) for network in networks
        ]
        report(f"{len(shown.names)} {shown.title}", folders, _named(args.plot, shown.title), networks)
    if data:
        folders = [args.out / f"training-{name}" for name in NAMES]
        batches = ut.Run(folders[0]).table("batches").num_rows
        report(f"first {batches} batches of training", folders, _named(args.plot, "training"))


def _named(plot: Path | None, what: str) -> Path | None:
    return plot and plot.with_stem(f"{plot.stem}_{what.replace('-', '_')}")


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of crops, weights and runs")
    parser.add_argument("--networks", choices=("imagenet", "fashion-mnist"), default="imagenet")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="of VGG16, trained on ImageNet")
    parser.add_argument("--weights-bn", type=Path, metavar="FILE", help="of VGG16-BN, trained on ImageNet")
    parser.add_argument("--photographs", type=Path, metavar="FOLDER", help="instead of the packaged crops")
    parser.add_argument("--limit-images", type=int, metavar="N", help="show N images of each kind")
    parser.add_argument("--batch-size", type=int, default=25, help="of what is shown; %(default)s")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the stem of a figure for each kind of images")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch")
    small = parser.add_argument_group("with --networks fashion-mnist")
    small.add_argument("--data", type=Path, metavar="FOLDER", help="with Fashion-MNIST's four .gz files")
    small.add_argument("--train-epochs", type=int, default=3)
    small.add_argument("--early", type=int, default=20, metavar="N", help="batches of training to record; %(default)s")
    small.add_argument("--limit", type=int, metavar="N", help="train and test with the first N images alone")
    small.add_argument("--width", type=int, default=16, help="channels of the first convolution; %(default)s")
    small.add_argument("--lr", type=float, default=5e-4, help="of Adam; %(default)s")
    small.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(words)
    for name in ("train_epochs", "early", "limit", "limit_images", "batch_size", "width", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    return args


def main(words: list[str] | None = None) -> int:
    args = arguments(words)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        study(args)
    except (StudyError, ut.UndertowError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was recorded is kept, and the same line goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
