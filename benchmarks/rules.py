"""AttnLRP and LRP: their cost beside the plain gradient of the same model, and LRP beside zennit.

    pip install -c constraints.txt -e '.[bench]'
    python benchmarks/rules.py --markdown benchmarks/rules.md

Costs are processor time in one process and one thread, in a new random order each round: the median over rounds of the
ratio to the plain gradient of the same round. Differences to zennit are in float64, relative (ℓ2), on networks with
random weights and statistics: its composites, and tables of one rule for all convolutions. zennit is given the
network's canonizer, and the stabiliser that it has at sums and means, which undertow leaves out, is 1e-14. Before 1.0,
what zennit makes of a merged batch norm still divides by √(1 + eps), so there they have eps=0. zennit 1.0 is not on the
package index: pip install "zennit @ git+https://github.com/chr5tphr/zennit@1.0.0". rules_memory.py measures memory.
"""

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

import undertow as ut
from undertow.frameworks.torch.zoo.importing import import_torchvision

TARGET = 3
ATTENTION = ("attnlrp", "cp-lrp")
ATTENTION_MAPS = ("attention-rollout", "attention-gradient")
LRP = ("lrp:epsilon", "lrp:epsilon-plus-flat", "lrp:epsilon-gamma-box", "lrp:epsilon-alpha2-beta1")
BOX = (-4.0, 4.0)
SINGLE = {"z⁺": ut.lrp.alpha_beta(1, 0), "γ 0.25": ut.lrp.gamma(0.25), "α1.5 β0.5": ut.lrp.alpha_beta(1.5, 0.5)}
COSTS = {
    "timm vit_tiny_patch16_224 b1": ("vit_tiny_patch16_224", 1, 224, (*ATTENTION, *ATTENTION_MAPS)),
    "timm vit_small_patch16_224 b2": ("vit_small_patch16_224", 2, 224, (*ATTENTION, *ATTENTION_MAPS)),
    "resnet18 b1": ("resnet18", 1, 224, LRP),
    "resnet50 b1": ("resnet50", 1, 224, LRP),
    "vgg16_bn b1": ("vgg16_bn", 1, 224, LRP),
}
ZENNIT = next((d.version for d in metadata.distributions(name="zennit")), "0")
EQUAL = ("vgg16", "vgg16_bn", "resnet50", "densenet121")


def network(name: str) -> nn.Module:
    torchvision = import_torchvision()
    torch.manual_seed(0)
    if name.startswith("vit"):
        import timm

        return timm.create_model(name, pretrained=False).eval().requires_grad_(False)
    return torchvision.models.get_model(name, weights=None).eval().requires_grad_(False)


def costs(name: str, rounds: int) -> list[str]:
    """Return a row for each rule."""
    reference, batch, size, rules = COSTS[name]
    model, x = network(reference), torch.randn(batch, 3, size, size)

    def plain() -> None:
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(model(leaf)[:, TARGET].sum(), leaf)

    def explained(rule: str) -> Callable[[], object]:
        return lambda: ut.explain(model, x, rule=rule, target=TARGET)

    calls = {"plain gradient": plain, **{rule: explained(rule) for rule in rules}}
    ratios: dict[str, list[float]] = {method: [] for method in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        seconds = {}
        for method in random.sample(list(calls), len(calls)):
            start = time.process_time()
            calls[method]()
            seconds[method] = time.process_time() - start
        for method, used in seconds.items():
            ratios[method].append(used / seconds["plain gradient"])
    return [f"| {name} | {method} | {statistics.median(values):.2f} |" for method, values in ratios.items()]


def drawn(name: str) -> nn.Module:
    """Return a network in which no bias and no batch norm is idle, in float64."""
    model = network(name)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0 if ZENNIT.startswith("0") else module.eps
            for tensor, low in ((module.weight, 0.5), (module.running_var, 0.5), (module.bias, -0.3)):
                tensor.copy_(low + torch.rand(tensor.shape, generator=generator))
            module.running_mean.copy_(0.3 * torch.randn(module.running_mean.shape, generator=generator))
        elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            module.bias.copy_(0.1 * torch.randn(module.bias.shape, generator=generator))
    return model.double()


def differences(name: str) -> list[str]:
    """Return a row for each composite."""
    import_torchvision()  # zennit imports it too
    from zennit.attribution import Gradient
    from zennit.composites import (
        EpsilonAlpha2Beta1,
        EpsilonGammaBox,
        EpsilonPlusFlat,
        ExcitationBackprop,
        LayerMapComposite,
    )
    from zennit.layer import Sum
    from zennit.rules import AlphaBeta, Epsilon, Gamma, Norm, Pass, ZPlus
    from zennit.torchvision import ResNetCanonizer, VGGCanonizer
    from zennit.types import Activation, AvgPool, BatchNorm, Convolution, Linear

    model, x = drawn(name), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    canonizers = [ResNetCanonizer()] if name.startswith("resnet") else [VGGCanonizer()]
    layer_map = [(AvgPool, Norm(1e-14)), (Sum, Norm(1e-14))]
    needs, theirs = type(canonizers[0]).__name__, model
    if name.startswith("densenet"):  # its canonizer merges by the modules' order, which is not the order of the calls
        canonizers, needs = (
            [merge_by_call()],
            "a canonizer of one's own, ε for batch norm, its last functions as modules",
        )
        layer_map.append((BatchNorm, Epsilon(0.0)))
        ending = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        theirs = nn.Sequential(model.features, *ending, model.classifier)
    passing = [(Activation, Pass())]

    def of(rule, linear):
        return LayerMapComposite(layer_map=[*layer_map, *passing, (Convolution, rule), (Linear, linear)], **options)

    options = {"canonizers": canonizers}
    bounded = ut.rules.composite("bounded", ut.lrp.gamma(), ut.lrp.box(*BOX))
    alone = {name: ut.rules.composite(name, row) for name, row in SINGLE.items()}
    rules = {
        "lrp:epsilon-plus-flat": lambda: EpsilonPlusFlat(layer_map=layer_map, **options),
        bounded: lambda: EpsilonGammaBox(*BOX, layer_map=layer_map, **options),
        "lrp:epsilon-alpha2-beta1": lambda: EpsilonAlpha2Beta1(layer_map=layer_map, **options),
        "lrp:epsilon": lambda: of(Epsilon(), Epsilon()),
        alone["z⁺"]: lambda: of(ZPlus(), Epsilon()),
        alone["γ 0.25"]: lambda: of(Gamma(0.25), Epsilon()),
        alone["α1.5 β0.5"]: lambda: of(AlphaBeta(1.5, 0.5), Epsilon()),
        "excitation": lambda: ExcitationBackprop(layer_map=layer_map, zero_params=["bias"], **options),
    }
    rows = []
    for rule, made in rules.items():
        given = x.abs() if rule == "excitation" else x  # zennit shares out over x⁻w⁻ too, where x is negative
        a = ut.explain(model, given, rule=rule, target=TARGET)
        with Gradient(theirs, made()) as attributor:
            _, wanted = attributor(given, lambda y: y * nn.functional.one_hot(torch.full((2,), TARGET), y.shape[1]))
        difference = float((a.values - wanted).norm() / wanted.norm())
        label = "lrp:epsilon-gamma-box" if rule is bounded else rule if isinstance(rule, str) else f"{rule.name}, ε"
        rows.append(f"| {name} | {label} | {difference:.0e} | {needs} |")
    return rows


def merge_by_call():
    """Merge the batch norms of a DenseNet into the convolutions that they read alone: conv0 and each layer's conv1."""
    from zennit.canonizers import MergeBatchNorm

    class Merge(MergeBatchNorm):
        def apply(self, root_module: nn.Module) -> list:
            pairs = [(m.conv1, m.norm2) for m in root_module.modules() if hasattr(m, "norm2")]
            features = root_module[0]
            pairs += [(features.conv0, features.norm0)]
            instances = []
            for linear, norm in pairs:
                instance = self.copy()
                instance.register((linear,), norm)
                instances.append(instance)
            return instances

    return Merge()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--only", choices=("costs", "differences"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"torch {torch.__version__}, 1 thread, Python {platform.python_version()}; {arguments.rounds} rounds.",
        "",
    ]
    if arguments.only != "differences":
        lines += ["| network, 224 px | rule | x plain gradient |", "|---|---|---:|"]
        lines += [row for name in COSTS for row in costs(name, arguments.rounds)] + [""]
    if arguments.only != "costs":
        lines += [
            f"| network, 64 px | rule | difference to zennit {ZENNIT} | what zennit needs |",
            "|---|---|---:|---|",
        ]
        lines += [row for name in EQUAL for row in differences(name)]
    text = "\n".join(lines).rstrip() + "\n"
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text)


if __name__ == "__main__":
    main()
