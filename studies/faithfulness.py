"""Which pixels carry the score, and does a map change with class and weights? Verdicts of `ut.trust`, with intervals.

    python studies/faithfulness.py demo --out runs/faithfulness    # the packaged network, photographs of scikit-image
    python studies/faithfulness.py vit --out runs/faithfulness     # a small ViT, trained here on Fashion-MNIST

Each explains the class that the network sees, has `ut.trust.of_map` judge every map, prints tables with intervals
(95 %, bootstrap over images) and writes a picture and the numbers into the folder. Trained weights stay there, and are
used again. What came out: docs/studies/faithfulness.md
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fashion_mnist import StudyError, accuracy, find_data, load_split, table
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import undertow as ut
from undertow.frameworks.torch.zoo.importing import import_torchvision
from undertow.show import plots

PHOTOGRAPHS = (
    *("chelsea.png", "coffee.png", "camera.png", "rocket.jpg"),
    *("astronaut.png", "motorcycle_left.png", "coins.png", "hubble_deep_field.jpg"),
)
COMMON: dict[str, dict[str, Any]] = {
    "gradient": {"rule": "gradient"},
    "input x gradient": {"rule": "gradient", "estimator": "input-times"},
    "attnlrp": {"rule": "attnlrp"},
}
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "demo": {
        "guided": {"rule": "guided"},
        **COMMON,
        "lrp:epsilon-plus-flat": {"rule": "lrp:epsilon-plus-flat"},
        "lrp:epsilon-gamma-box": {"rule": "lrp:epsilon-gamma-box"},
    },
    "vit": {
        "guided": {"rule": "guided", "activations": "all"},
        **COMMON,
        "integrated gradients": {"rule": "gradient", "estimator": "integrated:20"},
        "cp-lrp": {"rule": "cp-lrp"},
        "attention rollout": {"rule": "attention-rollout"},
        "attention x gradient": {"rule": "attention-gradient"},
    },
}
CONTROLS = ("random", "edges")
QUESTIONS = ("faithfulness", "class", "weights")
LEVELS = ("yes", "weak", "no")
TRAINING = {"epochs": 6, "batch": 128, "rate": 2e-3}


def vit() -> nn.Module:
    """Return a ViT of timm: 16 patches of 7 x 7 pixels, 3 blocks, 64 wide."""
    import_torchvision()
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 28, "patch_size": 7, "in_chans": 1, "num_classes": 10}
    return VisionTransformer(**sizes, embed_dim=64, depth=3, num_heads=4, mlp_ratio=2.0)


def trained(folder: Path, data: Path, epochs: int) -> nn.Module:
    """Return the ViT, trained, or as an earlier run left it in the folder."""
    torch.manual_seed(0)
    model, weights = vit(), folder / "vit.safetensors"
    if weights.is_file():
        model.load_state_dict(load_file(weights))
        return model.eval()
    x, y = load_split(data, "train")
    steps = epochs * -(-len(x) // TRAINING["batch"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=TRAINING["rate"], weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, TRAINING["rate"], total_steps=steps, pct_start=0.15)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        model.train()
        for ids in torch.randperm(len(x), generator=generator).split(TRAINING["batch"]):
            flipped = x[ids].flip(-1) if torch.rand((), generator=generator) < 0.5 else x[ids]
            optimizer.zero_grad()
            F.cross_entropy(model(flipped), y[ids]).backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: accuracy {accuracy(model, *load_split(data, 'test')):.4f}", flush=True)
    save_file(model.state_dict(), weights)
    return model.eval()


def photographs() -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each photograph by name, `(1, 3, 224, 224)`, as the packaged network takes it."""
    import skimage.data
    from PIL import Image

    preprocessing = ut.load("demo").preprocessing
    folder = Path(skimage.data.__file__).parent
    for name in PHOTOGRAPHS:
        with Image.open(folder / name) as picture:
            yield name, torch.from_numpy(preprocessing.array(picture.convert("RGB")))[None]


def judged(model: Any, x: torch.Tensor, target: int, how: dict[str, Any]) -> dict[str, Any]:
    """Return the answers of `ut.trust` about a map: the value and the level of each question."""

    def explainer(network: Any, images: Any, class_ids: Any) -> Any:
        return ut.explain(network, images, target=class_ids, **how).values

    verdict = ut.trust.of_map(model, x, explainer(model, x, target), explainer=explainer, target=target)
    return {name: (verdict.answers[name].value, verdict.answers[name].level) for name in QUESTIONS}


def controls(model: Any, x: torch.Tensor, target: int, seed: int) -> dict[str, float]:
    """Return the area of a map of noise, and that of the image's own edges, which is in every verdict."""
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed))
    answer = ut.trust.of_map(model, x, noise, target=target).answers["faithfulness"]
    return {"random": answer.value, "edges": answer.numbers["edges"]}


def measured(kind: str, model: Any, cases: list[tuple[str, torch.Tensor]]) -> dict[str, dict[str, list[Any]]]:
    """Return, for each method its answers to each question, and for each control its areas; one for each image."""
    answers: dict[str, dict[str, list[Any]]] = {name: {q: [] for q in QUESTIONS} for name in METHODS[kind]}
    answers |= {name: {"faithfulness": []} for name in CONTROLS}
    for i, (name, x) in enumerate(cases):
        with torch.no_grad():
            target = int(model(x).argmax())
        for method, how in METHODS[kind].items():
            for question, answer in judged(model, x, target, how).items():
                answers[method][question].append(answer)
        for control, area in controls(model, x, target, i).items():
            answers[control]["faithfulness"].append((area, ""))
        last = ", ".join(f"{method} {rows['faithfulness'][-1][0]:.3f}" for method, rows in answers.items())
        print(f"{i + 1} of {len(cases)}, {name}: {last}", file=sys.stderr, flush=True)
    return answers


def counted(answers: list[Any]) -> str:
    """Return how often each level was given, as "3 / 1 / 0"."""
    levels = [level for _, level in answers]
    return " / ".join(str(levels.count(level)) for level in LEVELS) if any(levels) else ""


def changed(answers: dict[str, dict[str, list[Any]]]) -> str:
    """Return a table: how alike a map is to those of other classes, and of networks whose layers are random."""
    found = []
    for method, by_question in answers.items():
        if "class" in by_question:
            columns = [method]
            for question in ("class", "weights"):
                values = np.array([value for value, _ in by_question[question]])
                columns += [f"{np.median(values):.2f}", span(interval(values)), counted(by_question[question])]
            found.append(columns)
    levels = ", ".join(LEVELS[:2]) + f" or {LEVELS[2]}"
    return table(["map", "other classes", "95 %", levels, "random weights", "95 %", levels], found)


def interval(values: np.ndarray, draws: int = 4000) -> tuple[float, float]:
    """Return the 95 % interval of a median, by bootstrap."""
    chosen = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(np.median(values[chosen], 1), (0.025, 0.975))
    return float(low), float(high)


def rows(gaps: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Return a row for each method, the best first: its median, and by how much it exceeds the gradient's.

    Not the mean: an area is scaled by what the score loses to blur, which for some images is next to nothing.
    """
    plain = np.array(gaps["gradient"])
    found = []
    for method, listed in gaps.items():
        values = np.array(listed)
        found.append(
            {
                "method": method,
                "median": float(np.median(values)),
                "interval": interval(values),
                "more than gradient": float(np.median(values - plain)),
                "interval of that": interval(values - plain),
            }
        )
    return sorted(found, key=lambda row: -row["median"])


def drawn(found: list[dict[str, Any]], title: str, path: Path) -> None:
    figure = plots.new_figure(figsize=(7.2, 0.34 * len(found) + 1.1), layout="constrained")
    axis = figure.subplots()
    for i, row in enumerate(reversed(found)):
        color = "0.55" if row["method"] in CONTROLS else "C0"
        axis.plot(row["interval"], (i, i), color=color, linewidth=2)
        axis.plot(row["median"], i, "o", color=color)
    axis.set_yticks(range(len(found)), [row["method"] for row in reversed(found)])
    axis.axvline(0, color="0.8", linewidth=1, zorder=0)
    axis.set_xlabel("area under insertion less that under deletion: median, 95 %")
    axis.set_title(title, loc="left")
    plots.save(figure, path)


def span(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.2f} to {pair[1]:.2f}"


def told(found: list[dict[str, Any]], answers: dict[str, dict[str, list[Any]]]) -> str:
    """Return a table of `rows`, with how often each level was given."""
    return table(
        ["map", "gap", "95 %", "more than gradient", "95 %", "yes, weak or no"],
        [
            [
                row["method"],
                f"{row['median']:.2f}",
                span(row["interval"]),
                f"{row['more than gradient']:+.2f}",
                span(row["interval of that"]),
                counted(answers[row["method"]]["faithfulness"]),
            ]
            for row in found
        ],
    )


def run(kind: str, out: Path, data: Path | None, images: int, epochs: int) -> list[dict[str, Any]]:
    out.mkdir(parents=True, exist_ok=True)
    model: Any
    if kind == "demo":
        model = ut.load("demo").module
        cases, title = list(photographs())[:images], "EfficientNet-lite0, photographs of scikit-image"
    else:
        folder = find_data(data)
        model = trained(out, folder, epochs)
        x, y = load_split(folder, "test")
        print(f"accuracy {accuracy(model, x, y):.4f}")
        cases, title = [(str(i), x[i : i + 1]) for i in range(images)], "a small ViT, Fashion-MNIST"
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    answers = measured(kind, model, cases)
    found = rows({method: [value for value, _ in a["faithfulness"]] for method, a in answers.items()})
    numbers = {"images": [name for name, _ in cases], "answers": answers, "rows": found}
    (out / f"{kind}.json").write_text(json.dumps(numbers, indent=1))
    drawn(found, f"{title}: {len(cases)}", out / f"{kind}.png")
    print(told(found, answers), changed(answers), sep="\n\n")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("demo", "vit"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="the folder of Fashion-MNIST's four .gz files")
    parser.add_argument("--images", type=int, help="how many; default 8 photographs, 48 garments")
    parser.add_argument("--epochs", type=int, default=TRAINING["epochs"])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    count = args.images or {"demo": len(PHOTOGRAPHS), "vit": 48}[args.kind]
    try:
        run(args.kind, args.out, args.data, count, args.epochs)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
