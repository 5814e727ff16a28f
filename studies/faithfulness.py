"""Which map's pixels carry the score? Deletion and insertion of `ut.trust` on two networks, for rules and controls.

    python studies/faithfulness.py demo --out runs/faithfulness    # the packaged network, photographs of scikit-image
    python studies/faithfulness.py vit --out runs/faithfulness     # a small ViT, trained here on Fashion-MNIST

Each explains the class that the network sees, judges every map as `ut.trust` does, prints a table with intervals
(95 %, bootstrap over images) and writes a picture and the numbers into the folder. Trained weights stay there, and are
used again. What came out: docs/studies/faithfulness.md
"""

import argparse
import copy
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
from undertow import similarity
from undertow.frameworks.torch.zoo.importing import import_torchvision
from undertow.show import plots
from undertow.verdict import faithfulness

PHOTOGRAPHS = (
    *("chelsea.png", "coffee.png", "camera.png", "rocket.jpg"),
    *("astronaut.png", "motorcycle_left.png", "coins.png", "hubble_deep_field.jpg"),
)
COMMON: dict[str, dict[str, Any]] = {
    "gradient": {"rule": "gradient"},
    "input x gradient": {"rule": "gradient", "estimator": "input-times"},
    "integrated gradients": {"rule": "gradient", "estimator": "integrated:20"},
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
        "cp-lrp": {"rule": "cp-lrp"},
        "attention rollout": {"rule": "attention-rollout"},
        "attention x gradient": {"rule": "attention-gradient"},
    },
}
CONTROLS = ("random", "edges")
STEPS = {"demo": 4, "vit": 8}  # shares of the pixels at which scores are taken
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


def judged(kind: str, model: Any, x: torch.Tensor, values: Any, target: int) -> dict[str, float]:
    """Return the area between insertion and deletion, under blur, for a map and for the image's edges.

    It is the number of the verdict's question, without the many random orders that decide its level.
    """

    def scores(batch: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(batch.astype(np.float32)))[:, target].double().numpy()

    answer = faithfulness.answer(np.asarray(values[0], np.float64), x[0].numpy(), scores, 1, 0, STEPS[kind])
    return {"map": answer.value, "edges": answer.numbers["edges"]}


def measured(kind: str, model: Any, cases: list[tuple[str, torch.Tensor]]) -> dict[str, list[float]]:
    """Return, for each method and control, one area for each image."""
    gaps: dict[str, list[float]] = {name: [] for name in (*METHODS[kind], *CONTROLS)}
    for i, (name, x) in enumerate(cases):
        with torch.no_grad():
            target = int(model(x).argmax())
        for method, how in METHODS[kind].items():
            gaps[method].append(
                judged(kind, model, x, ut.explain(model, x, target=target, **how).values, target)["map"]
            )
        noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(i))
        controls = judged(kind, model, x, noise, target)
        gaps["random"].append(controls["map"])
        gaps["edges"].append(controls["edges"])
        last = ", ".join(f"{method} {values[-1]:.3f}" for method, values in gaps.items())
        print(f"{i + 1} of {len(cases)}, {name}: {last}", file=sys.stderr, flush=True)
    return gaps


def changed(kind: str, model: Any, cases: list[tuple[str, torch.Tensor]]) -> str:
    """Return a table: how alike a map is to that of the runner-up, and to that of a network half of which is random."""
    scrambled = copy.deepcopy(model)
    layers = [module for module in scrambled.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    torch.manual_seed(0)
    for layer in layers[len(layers) // 2 :]:
        layer.reset_parameters()
    found = []
    for method, how in METHODS[kind].items():
        alike = []
        for _, x in cases:
            with torch.no_grad():
                target, other = model(x)[0].topk(2).indices.tolist()
            own = ut.explain(model, x, target=target, **how).values
            pairs = (model, other), (scrambled, target)
            maps = [ut.explain(network, x, target=k, **how).values for network, k in pairs]
            alike.append([similarity.spearman(*(similarity.plane(np.asarray(m[0])) for m in (own, b))) for b in maps])
        found.append([method, *(f"{value:.2f}" for value in np.mean(alike, 0))])
    return table(["map", "like the runner-up's", "like that of random upper layers"], found)


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


def told(found: list[dict[str, Any]]) -> str:
    def span(pair: tuple[float, float]) -> str:
        return f"{pair[0]:.3f} to {pair[1]:.3f}"

    return table(
        ["map", "gap", "95 %", "more than gradient", "95 %"],
        [
            [
                row["method"],
                f"{row['median']:.3f}",
                span(row["interval"]),
                f"{row['more than gradient']:+.3f}",
                span(row["interval of that"]),
            ]
            for row in found
        ],
    )


def run(
    kind: str, out: Path, data: Path | None, images: int, epochs: int, only_change: bool = False
) -> list[dict[str, Any]]:
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
    print(changed(kind, model, cases))
    if only_change:
        return []
    gaps = measured(kind, model, cases)
    found = rows(gaps)
    numbers = {"images": [name for name, _ in cases], "gaps": gaps, "rows": found}
    (out / f"{kind}.json").write_text(json.dumps(numbers, indent=1))
    drawn(found, f"{title}: {len(cases)}", out / f"{kind}.png")
    print(told(found))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("demo", "vit"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="the folder of Fashion-MNIST's four .gz files")
    parser.add_argument("--images", type=int, help="how many; default 8 photographs, 60 garments")
    parser.add_argument("--epochs", type=int, default=TRAINING["epochs"])
    parser.add_argument("--only-change", action="store_true", help="only: does a map change with class and weights?")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    count = args.images or {"demo": len(PHOTOGRAPHS), "vit": 60}[args.kind]
    try:
        run(args.kind, args.out, args.data, count, args.epochs, args.only_change)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
