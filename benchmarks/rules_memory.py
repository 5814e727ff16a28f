"""What a map takes of memory: undertow's rules, zennit, LXT and the plain gradient, each in a process of its own.

    python benchmarks/rules_memory.py                                # undertow, zennit, the plain gradient
    lxt/bin/python benchmarks/rules_memory.py --only "Llama"         # in the environment of lxt.txt: LXT too

Each process makes the network and the input, explains a small network once by the same method, so that everything is
imported, and then explains the large one once. What is told is by how much the process grew in that call at its
largest (VmHWM above VmRSS, Linux): activations, gradients, copies of weights and the library's own. One thread.
"""

import argparse
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import undertow as ut
from rules import ATTENTION, BOX, LRP, TARGET, network
from undertow.frameworks.torch.zoo.importing import import_torchvision
from undertow.memory import peak

PLAIN = "plain gradient"
ZENNIT = {rule: f"zennit, {rule.removeprefix('lrp:')}" for rule in LRP[1:]}
NETWORKS = {
    "resnet50 b1": ("resnet50", (1, 3, 224, 224), (PLAIN, *LRP, *ZENNIT.values())),
    "vgg16 b1": ("vgg16", (1, 3, 224, 224), (PLAIN, *LRP, *ZENNIT.values())),
    "timm vit_small_patch16_224 b2": ("vit_small_patch16_224", (2, 3, 224, 224), (PLAIN, *ATTENTION)),
    "Llama, 8 layers of 512, 512 tokens": ("llama", (1, 512, 512), (PLAIN, *ATTENTION, "LXT, attnlrp")),
    "the same, checkpointed": ("llama, checkpointed", (1, 512, 512), (PLAIN, *ATTENTION)),
}


def made(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a network, frozen, as a function of one input to scores."""
    if not name.startswith("llama"):
        return network(name)
    import_torchvision()
    import transformers

    sizes = {"vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "attn_implementation": "sdpa", "use_cache": False}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval().requires_grad_(False)
    if "checkpointed" in name:
        switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        switch({"use_reentrant": False})
        model.train()
    return lambda x: model(inputs_embeds=x).logits[:, -1]


def plainly(model: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(leaf)[:, TARGET].sum(), leaf)
    return g


def by_zennit(rule: str) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Return what explains by a composite of zennit, with the network's canonizer."""
    import_torchvision()
    from zennit.attribution import Gradient
    from zennit.composites import EpsilonAlpha2Beta1, EpsilonGammaBox, EpsilonPlusFlat
    from zennit.torchvision import ResNetCanonizer, VGGCanonizer

    composites = {
        "lrp:epsilon-plus-flat": (EpsilonPlusFlat, {}),
        "lrp:epsilon-gamma-box": (EpsilonGammaBox, {"low": BOX[0], "high": BOX[1]}),
        "lrp:epsilon-alpha2-beta1": (EpsilonAlpha2Beta1, {}),
    }
    composite, options = composites[rule]

    def explain(model: Any, x: torch.Tensor) -> torch.Tensor:
        canonizer = VGGCanonizer() if type(model).__name__ == "VGG" else ResNetCanonizer()
        with Gradient(model, composite(canonizers=[canonizer], **options)) as attributor:
            _, g = attributor(x, lambda y: y * nn.functional.one_hot(torch.full((len(y),), TARGET), y.shape[1]))
        return g

    return explain


def by_lxt(model: Any, x: torch.Tensor) -> torch.Tensor:
    return x * plainly(model, x)


def method_of(name: str) -> Callable[[Any, torch.Tensor], object]:
    if name == PLAIN:
        return plainly
    if name.startswith("LXT"):
        from lxt.efficient import monkey_patch
        from transformers.models.llama import modeling_llama

        monkey_patch(modeling_llama)
        return by_lxt
    rule = next((rule for rule, label in ZENNIT.items() if label == name), None)
    return by_zennit(rule) if rule else lambda model, x: ut.explain(model, x, rule=name, target=TARGET).values


def one(label: str, method: str) -> int:
    """Measure one call in this process, which must be a new one: bytes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    name, shape, _ = NETWORKS[label]
    import_torchvision()
    explain = method_of(method)
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 8))
    explain(small.eval().requires_grad_(False), torch.randn(1, 3, 8, 8))
    model, x = made(name), torch.randn(shape)
    grown = peak()
    assert grown is not None, "this system does not tell"
    explain(model, x)
    return grown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="networks whose name begins so")
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(one(*arguments.one))
        return
    print("| network | method | peak MiB | x plain gradient |\n|---|---|---:|---:|")
    for label, (_, _, methods) in NETWORKS.items():
        if not label.startswith(arguments.only):
            continue
        plain = 0.0
        for method in methods:
            command = [sys.executable, __file__, "--one", label, method]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{label}, {method}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            mib = int(done.stdout.split()[-1]) / 2**20
            plain = mib if method == PLAIN else plain
            print(f"| {label} | {method} | {mib:.0f} | {mib / plain:.2f} |", flush=True)


if __name__ == "__main__":
    main()
