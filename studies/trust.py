"""When may a map be believed? Known failures of maps, reproduced; a planted truth; and verdicts on photographs.

    python studies/trust.py random --out runs/trust        # one random layer: guided maps are the image
    python studies/trust.py weights --out runs/trust       # a VGG11, last layer initialised anew; directions over depth
    python studies/trust.py planted --out runs/trust       # a patch decides: which map finds it, and who cheats?
    python studies/trust.py demo --out runs/trust          # rule x estimator x question on four photographs

Each prints its tables and writes a picture and the numbers into the folder. `demo` goes on where it was stopped. What
came out: docs/studies/trust.md
"""

import argparse
import json
import sys
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fashion_mnist import StudyError, bar, find_data, load_split, table
from rich.console import Console
from rich.progress import Progress, TextColumn
from torch import nn
from torch.nn import functional as F

import undertow as ut
from undertow import images, models, similarity
from undertow.classifier import Classifier
from undertow.frameworks import base
from undertow.verdict import convergence, input
from undertow.verdict.photograph import JudgedPhotograph, write

RULES = ("gradient", "deconvnet", "guided")
ESTIMATORS = (
    "gradient",
    "smoothgrad:10",
    "integrated:10",
    "input-times",
    "grad-cam:_conv_head",
    "guided-grad-cam:_conv_head",
)
FILTERS = (4, 16, 64, 256, 1024)
GARMENTS = (0, 2, 4, 6)  # T-shirt, pullover, coat, shirt: the four that are hard to tell apart
NAMES = ("T-shirt", "pullover", "coat", "shirt")
SIDE = 5  # pixels, of a planted patch


class OneLayer(nn.Module):
    """A convolution of 7 x 7 with random weights, a ReLU, and random scores of all its outputs."""

    def __init__(self, filters: int, seed: int, size: int = 48, classes: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.filters = torch.randn(filters, 3, 7, 7, generator=generator) / 147**0.5
        self.head = torch.randn(classes, filters, size - 6, size - 6, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bfhw,cfhw->bc", F.relu(F.conv2d(x, self.filters)), self.head)


def photograph_patch(size: int = 48) -> torch.Tensor:
    """Return the middle of the cat, mean 0 and deviation 1, (1, 3, size, size)."""
    view = images.Preprocessing(resize=size, crop=size).view(images.read(images.demo_photographs()["chelsea"]))
    x = torch.from_numpy(view.copy()).permute(2, 0, 1)[None].float()
    return (x - x.mean()) / x.std()


def random_layer(seeds: int = 5, filters: tuple[int, ...] = FILTERS) -> list[dict[str, float]]:
    """Measure how the signed map of one random layer correlates with the image, as a mean over seeds and scores."""
    x, rows = photograph_patch(), []
    for count in filters:
        row: dict[str, float] = {"filters": count}
        for rule in RULES:
            networks = (OneLayer(count, seed).eval() for seed in range(seeds))
            maps = [ut.explain(network, x, rule=rule, target=[[0, 1, 2]]).numpy()[0] for network in networks]
            row[rule] = float(np.mean([similarity.correlation(m, x.numpy()) for of_seed in maps for m in of_seed]))
        rows.append(row)
    return rows


def vgg11(width: int = 16, classes: int = 10, seed: int = 0) -> nn.Sequential:
    """Build VGG11 at a quarter of its width, for one channel of 32 x 32."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    widths = [1, *(width * w for w in (1, 2, 4, 4, 8, 8, 8, 8))]
    for number, (before, after) in enumerate(pairwise(widths)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if number in (0, 1, 3, 5, 7) else []
    top = 8 * width
    layers += [nn.Flatten(), nn.Linear(top, top), nn.ReLU(), nn.Linear(top, top), nn.ReLU(), nn.Linear(top, classes)]
    for module in layers:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)
    return nn.Sequential(*layers)


def small_network(classes: int, seed: int = 0) -> nn.Sequential:
    """Build three convolutions and one linear layer for one channel of 28 x 28."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    layers += [nn.MaxPool2d(2), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 49, classes)]
    return nn.Sequential(*layers)


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int, name: str, seed: int = 0) -> nn.Module:
    """Train by Adam in batches of 64, and return the model in evaluation mode."""
    optimizer = torch.optim.Adam(model.train().parameters(), 1e-3)
    with bar() as progress:
        task = progress.add_task(name, total=epochs * len(x), speed="")
        for epoch in range(epochs):
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1000 * seed + epoch))
            for chosen in order.split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(x[chosen]), y[chosen]).backward()
                optimizer.step()
                progress.advance(task, len(chosen))
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    return float((model(x).argmax(1) == y).float().mean())


def last_layer(model: nn.Sequential, x: torch.Tensor) -> list[dict[str, Any]]:
    """Initialise the last layer anew, and measure how alike each image's map stays, as a mean over images."""
    inspector = base.capability("torch", "inspect.layers")
    twin = inspector.reinitialized(model, [str(len(model) - 1)], seed=0)
    classes, rows = model(x).argmax(1), []
    for rule in RULES:
        before, after = (ut.explain(m, x, rule=rule, target=classes).numpy() for m in (model, twin))
        alike = [similarity.similarities(a, b) for a, b in zip(before, after, strict=True)]
        rows.append({"rule": rule, **{key: float(np.mean([a[key] for a in alike])) for key in alike[0]}})
    return rows


def over_depth(model: nn.Sequential, x: torch.Tensor) -> dict[str, list[float]]:
    """Send 6 random directions back; return each rule's mean cosine at each convolution, top down, and the image."""
    inspector = base.capability("torch", "inspect.layers")
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    drawn = np.random.default_rng(0).standard_normal((6, model(x[:1]).shape[1])).astype(np.float32)
    curves = {}
    for rule in RULES:
        request = base.Request(model, (x[:1],), ut.rules.RULES[rule], rule, None, "graph", "relu-like", False)
        arrived = inspector.layer_gradients(request, convolutions, drawn)
        gradients = [arrived.gradients[name][0] for name in reversed(convolutions)]
        curves[rule] = [convergence.mean_cosine(g) for g in [*gradients, arrived.at_input[0]]]
    return curves


def stamps(labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a patch for each label, as an image of its values and one of where it is, (N, 1, 28, 28) each."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    patterns = torch.stack([y % 2, x % 2, (x + y) % 2, ((x - 2).abs() < 1) | ((y - 2).abs() < 1)]).float() * 4 - 1
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 28 - SIDE + 1, (len(labels), 2), generator=generator)
    values, where = torch.zeros(len(labels), 1, 28, 28), torch.zeros(len(labels), 1, 28, 28)
    for image, mask, (top, left), label in zip(values, where, corners.tolist(), labels.tolist(), strict=True):
        image[0, top : top + SIDE, left : left + SIDE] = patterns[label]
        mask[0, top : top + SIDE, left : left + SIDE] = 1
    return values, where


def stamped(x: torch.Tensor, labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Put each label's patch at a random place of its image; return the images and where the patches are."""
    values, where = stamps(labels, seed)
    return torch.where(where > 0, values, x), where


def shares(model: nn.Module, x: torch.Tensor, where: torch.Tensor) -> list[dict[str, Any]]:
    """Measure which share of each map's magnitudes lies on the patch, as a mean over images; the largest first."""
    rows = []
    for rule, estimator in product(RULES, ("gradient", "smoothgrad:10", "integrated:10", "input-times", "grad-cam:6")):
        maps = ut.explain(model, x, rule=rule, estimator=estimator).numpy()
        rows.append({"method": f"{rule} {estimator}", "share": share(maps, where)})
    edges = np.stack([input.edges(image)[None] for image in x.numpy()])
    rows.append({"method": "the image's edges", "share": share(edges, where)})
    rows.append({"method": "chance", "share": SIDE**2 / 28**2})
    return sorted(rows, key=lambda row: -row["share"])


def share(maps: np.ndarray, where: torch.Tensor) -> float:
    strong = np.stack([similarity.plane(values) for values in maps])
    total = strong.sum((1, 2))
    return float(np.mean((strong * where[:, 0].numpy()).sum((1, 2)) / np.where(total > 0, total, 1)))


def hypotheses(
    model: nn.Module, x: torch.Tensor, where: torch.Tensor, plain: torch.Tensor
) -> dict[str, dict[str, int]]:
    """Ask whether the garment's pixels carry the score, and whether the patch's do: maps that one might believe in."""
    counts = {}
    for name in ("garment", "patch"):
        levels, beats = [], 0
        for i in range(len(x)):
            order = np.random.default_rng(i).random((28, 28)) * 0.01  # breaks ties
            garment = (plain[i, 0] > plain[i, 0].min()).numpy() & ~(where[i, 0] > 0).numpy()
            order += garment if name == "garment" else where[i, 0].numpy()
            verdict = ut.trust.of_map(model, x[i : i + 1], order)
            answer = verdict.answers["faithfulness"]
            levels.append(answer.level)
            imputation = answer.numbers["replacements"]["imputation"]
            beats += imputation["map"]["gap"] > imputation["random"]["gap"]
        counts[name] = {level: levels.count(level) for level in ("yes", "weak", "no")} | {"imputation": beats}
    return counts


def data(args: argparse.Namespace, split: str, max_images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and labels of the four garments, labelled 0 to 3."""
    x, y = load_split(find_data(args.data), split)
    chosen = torch.isin(y, torch.tensor(GARMENTS)).nonzero()[:max_images, 0]
    return x[chosen], torch.searchsorted(torch.tensor(GARMENTS), y[chosen])


def study_random(args: argparse.Namespace) -> dict[str, Any]:
    rows = random_layer()
    print("Correlation of the map of one random layer with the image\n")
    print(table(["filters", *RULES], [[r["filters"], *(f"{r[rule]:.2f}" for rule in RULES)] for r in rows]))
    return {"rows": rows}


def study_weights(args: argparse.Namespace) -> dict[str, Any]:
    folder = find_data(args.data)
    x, y = load_split(folder, "train", args.limit)
    test, labels = load_split(folder, "test", 1000)
    x, test = F.pad(x, (2, 2, 2, 2), value=x.min()), F.pad(test, (2, 2, 2, 2), value=x.min())
    model = train(vgg11(), x, y, args.epochs, "VGG11")
    rows, curves = last_layer(model, test[:20]), over_depth(model, test)
    print(f"VGG11 at a quarter of its width: {100 * accuracy(model, test, labels):.1f} % of 1,000 test images\n")
    print("How alike maps stay when the last layer is initialised anew, mean of 20 test images\n")
    keys = ("spearman", "cosine", "ssim")
    print(table(["rule", *keys], [[r["rule"], *(f"{r[key]:.2f}" for key in keys)] for r in rows]) + "\n")
    print("Mean cosine of random directions, from the last convolution to the image\n")
    heads = [*(f"conv {n}" for n in range(8, 0, -1)), "image"]
    print(table(["rule", *heads], [[rule, *(f"{c:.3f}" for c in curve)] for rule, curve in curves.items()]))
    return {"rows": rows, "curves": curves, "accuracy": accuracy(model, test, labels)}


def study_planted(args: argparse.Namespace) -> dict[str, Any]:
    (x, y), (test, right) = data(args, "train", args.limit), data(args, "test", 400)
    anything, asked = (torch.randint(0, 4, (len(v),), generator=torch.Generator().manual_seed(7)) for v in (y, right))
    patched, where = stamped(test, asked, seed=1)
    judged = train(small_network(4), stamped(x, anything, seed=0)[0], anything, args.epochs, "the patch decides")
    rows = shares(judged, patched[:100], where[:100])
    print(f"The patch decides the class: {100 * accuracy(judged, patched, asked):.1f} % of 400 test images\n")
    print("Share of the map on the patch, mean of 100 test images\n")
    print(table(["method", "share"], [[r["method"], f"{r['share']:.3f}"] for r in rows]) + "\n")
    honest = train(small_network(4), stamped(x, anything, seed=0)[0], y, args.epochs, "honest")
    cheat = train(small_network(4), stamped(x, y, seed=0)[0], y, args.epochs, "cheat")
    numbers: dict[str, Any] = {"shares": rows}
    body = []
    for name, model, labels in (("honest", honest, asked), ("cheat", cheat, right)):
        familiar, patches = stamped(test, labels, seed=2)
        other = stamped(test, (right + 1) % 4, seed=2)[0]
        levels = hypotheses(model, familiar[:20], patches[:20], test[:20])
        pair = accuracy(model, familiar, right), accuracy(model, other, right)
        numbers[name] = {"accuracy": pair, "levels": levels}
        counts = [f"{c['yes']}/{c['weak']}/{c['no']}, {c['imputation']}" for c in levels.values()]
        body.append([name, *(f"{100 * a:.1f} %" for a in pair), *counts])
    print("Two models of the garment; do garment and patch carry the score? 20 test images")
    print("(imputed: of how many the pixels beat the mean of random orders where neighbours fill in)\n")
    hypothesis_heads = ["garment: yes/weak/no, imputed", "patch: yes/weak/no, imputed"]
    print(table(["model", "as trained", "patch of another class", *hypothesis_heads], body))
    return numbers


def study_demo(args: argparse.Namespace) -> dict[str, Any]:
    classifier = models.load("demo")
    photographs = images.demo_photographs()
    chosen = args.photographs or list(photographs)
    pairs = [(name, r, e) for name in chosen for e, r in product(args.estimators or ESTIMATORS, RULES)]
    columns = (TextColumn("{task.description}"), TextColumn("{task.completed} of {task.total}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("verdicts", total=len(pairs))
        for name, rule, estimator in pairs:
            judge_photograph(classifier, photographs[name], rule, estimator, args.out / "demo")
            progress.advance(task)
    verdicts = {path.stem: json.loads(path.read_text()) for path in sorted((args.out / "demo").glob("*.json"))}
    questions = ("class", "weights", "input", "faithfulness", "stability", "convergence")
    for name in chosen:
        of_photograph = [v for key, v in verdicts.items() if key.startswith(f"{name}_")]
        order = [(e, r) for e, r in product(ESTIMATORS, RULES)]
        of_photograph.sort(key=lambda v: order.index((v["estimator"], v["rule"])))
        print(f"\n{name}: {of_photograph[0]['target_name']}\n")
        heads = ["estimator, rule", *questions, "seconds"]
        print(table(heads, [[f"{v['estimator']}, {v['rule']}", *(_cell(v, q) for q in questions), f"{v['seconds']:.0f}"]
                            for v in of_photograph]) + "\n")  # fmt: skip
        for v in of_photograph:
            print(f"- {v['estimator']}, {v['rule']}: {v['sentence']}")
    return {}


def _cell(verdict: dict[str, Any], question: str) -> str:
    answer = verdict["answers"].get(question)
    return f"{answer['level']} {answer['value']:.2f}" if answer else "-"


def judge_photograph(classifier: Classifier, path: Path, rule: str, estimator: str, out: Path) -> None:
    """Write one verdict and its picture, unless they are there."""
    target = out / f"{path.stem}_{rule}_{estimator.replace(':', '-')}.json"
    if target.exists():
        return
    photograph = images.read(path)
    x = torch.from_numpy(classifier.preprocessing.array(photograph))[None]
    verdict = ut.trust(classifier.module, x, rule=rule, estimator=estimator, names=classifier.classes)
    view = classifier.preprocessing.view(photograph)
    write(JudgedPhotograph(path, view, {f"{rule} {estimator}": verdict}), classifier, out / path.stem)
    target.write_text(json.dumps(verdict.to_dict(), indent=1), encoding="utf-8")


def draw(study: str, numbers: dict[str, Any], path: Path) -> None:
    """Draw a study's numbers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    colours = dict(zip(RULES, ("#0072B2", "#009E73", "#D55E00"), strict=True))
    if study == "random":
        axis = figure.subplots()
        for rule in RULES:
            points = [(row["filters"], row[rule]) for row in numbers["rows"]]
            axis.plot(*zip(*points, strict=True), "-o", color=colours[rule], label=rule)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("filters of one random 7 x 7 convolution")
        axis.set_ylabel("correlation of the map with the image")
        axis.legend(frameon=False)
    elif study == "weights":
        left, right = figure.subplots(1, 2)
        for position, row in enumerate(numbers["rows"]):
            left.bar(position, row["spearman"], color=colours[row["rule"]])
        left.set_xticks(range(3), RULES)
        left.set_ylabel("rank correlation with the map before")
        left.set_title("last layer initialised anew", fontsize=10)
        for rule, curve in numbers["curves"].items():
            right.plot(range(len(curve)), curve, "-o", color=colours[rule], label=rule)
        right.set_xticks(range(9), [*range(8, 0, -1), "image"])
        right.set_xlabel("convolution, from the top down")
        right.set_title("mean cosine of random directions", fontsize=10)
        right.legend(frameon=False)
    else:
        axis = figure.subplots()
        rows = numbers["shares"][::-1]
        figure.set_size_inches(9, 5)
        plain = ("chance", "the image's edges")
        shades = ["#888890" if r["method"] in plain else colours[r["method"].split()[0]] for r in rows]
        axis.barh([r["method"] for r in rows], [r["share"] for r in rows], color=shades)
        axis.set_xlabel("share of the map on the patch that decides the class")
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


STUDIES = {"random": study_random, "weights": study_weights, "planted": study_planted, "demo": study_demo}


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=tuple(STUDIES))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="with Fashion-MNIST's four .gz files")
    parser.add_argument("--limit", type=int, default=12_000, help="training images; %(default)s")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--photographs", nargs="*", metavar="NAME", help="of the demo; all four if left out")
    parser.add_argument("--estimators", nargs="*", metavar="HOW", help="of the demo; all six if left out")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    args = arguments(words)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        numbers = STUDIES[args.study](args)
    except (StudyError, ut.UndertowError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.study != "demo":
        (args.out / f"{args.study}.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
        draw(args.study, numbers, args.out / f"{args.study}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
