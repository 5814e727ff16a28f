"""How long derivatives take: 2^20 paths, a fully connected graph, and the blocks of real models.

python benchmarks/derive.py
"""

import statistics
import time
from collections.abc import Callable

import torch

from undertow.derive import Network, from_model
from undertow.frameworks.torch.zoo.importing import import_torchvision

ROUNDS = 5


def derived(widths: list[int]) -> None:
    """Derive from the edges up, and write all three forms."""
    d = Network.layered(widths).derivative("b[1]")
    _ = d.text, d.latex, d.expression, d.operations


def median(call: Callable[[], object]) -> float:
    """Return the median of a few rounds in milliseconds; the first, which imports, is left out."""
    call()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def main() -> None:
    torch.manual_seed(0)
    print("| what | ms |\n|---|---|")
    for widths in ([2] * 21, [8] * 6, [64] * 6):
        paths = Network.layered(widths).derivative("b[1]").operations.paths
        print(f"| text, LaTeX, SymPy, counts: {len(widths)} layers of {widths[0]}, {paths:,} paths "
              f"| {median(lambda widths=widths: derived(widths)):.1f} |")  # fmt: skip
    check = Network.layered([2] * 21).derivative("b[1]")
    print(f"| check of the first against autograd | {median(check.check):.1f} |")
    models = import_torchvision().models
    x = torch.randn(1, 3, 224, 224)
    for name, depth in (("resnet18", 3), ("densenet121", 3)):
        model = getattr(models, name)(weights=None).eval()
        passed = median(lambda model=model: model(x.clone().requires_grad_()).sum().backward())
        print(f"| forward and backward of {name} | {passed:.0f} |")
        blocks = median(lambda model=model, depth=depth: from_model(model, x, depth))
        print(f"| from_model({name}, depth={depth}) | {blocks:.0f} |")


if __name__ == "__main__":
    main()
