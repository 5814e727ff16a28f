"""Small real photographs, and a small network, for sweeps."""

from pathlib import Path

import torch
from PIL import Image

from undertow import images
from undertow.classifier import Classifier
from undertow.images import Preprocessing

SIZE = 20

NETS = """
import torch

def load():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, stride=2), torch.nn.ReLU(), torch.nn.Conv2d(4, 5, 3), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(5 * 7 * 7, 6))
    size = {"resize": 24, "crop": 20, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return {"module": net, "preprocessing": size, "classes": list("abcdef")}
"""


def network() -> torch.nn.Module:
    """Return the network of NETS."""
    space: dict = {}
    exec(NETS, space)
    return space["load"]()["module"].eval()


def classifier() -> Classifier:
    """Return the network of NETS as a classifier."""
    size = Preprocessing(24, 20, (0.5,) * 3, (0.25,) * 3)
    return Classifier("small", network(), size, tuple("abcdef"), "given", "0" * 64)


def crops(folder: Path, count: int, suffix: str = ".png") -> list[str]:
    """Write squares of the packaged photographs into a folder, in two folders within; return their names, sorted."""
    photographs = [Image.open(path).convert("RGB") for path in images.demo_photographs().values()]
    names = []
    for n in range(count):
        photograph = photographs[n % len(photographs)]
        x, y = (37 * n) % (photograph.width - 40), (53 * n) % (photograph.height - 40)
        name = f"{'ab'[n % 2]}/{n:04d}{suffix}"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        photograph.crop((x, y, x + 40, y + 40)).save(folder / name)
        names.append(name)
    return sorted(names)
