"""`undertow trace`: the inputs, outputs and gradients of each module in one pass, as a table."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .photographs import device_option, input_line, load_classifier, model_options, preprocess_option
from .printing import echo, print_json

if TYPE_CHECKING:
    from ..classifier import Classifier

EXAMPLES = """\b
Examples:
  undertow trace --model torchvision:vgg11@none
  undertow trace cat.jpg --model demo --json
  undertow trace --model nets.py:load --shape 1,3,32,32 --seed 1
"""
WRONG = 1


@click.command(short_help="What goes in and out of each module in one pass.", epilog=EXAMPLES)
@click.argument("photograph", metavar="[IMAGE]", required=False, type=click.Path(path_type=Path))
@model_options
@click.option(
    "--weights",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A .safetensors file, or a state dict saved by torch.save.",
)
@preprocess_option
@click.option("--shape", metavar="B,C,H,W", help="Of the random input; the model's own, one image, if left out.")
@click.option("--seed", default=0, show_default=True, help="Of the random input.")
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def trace(
    photograph: Path | None,
    reference: str,
    classes: str | None,
    weights: Path | None,
    preprocess: str | None,
    shape: str | None,
    seed: int,
    device: str,
    as_json: bool,
) -> int:
    """Show what each module's gradients are in one pass, and whether closed formulas agree.

    IMAGE is a photograph; without it the input is random. The gradient at the output is one everywhere: that of the
    sum of all scores. The exit code is 1 if a custom backward is wrong or a formula differs.
    """
    from ..frameworks.results import DIFFERS
    from ..recording.trace import trace as trace_pass

    classifier = load_classifier(reference, weights, preprocess, None, classes)
    x = batch_for(classifier, photograph, shape, seed, device)
    traced = trace_pass(classifier.module, x)
    if photograph is not None and not as_json:
        echo(input_line(classifier))
    if as_json:
        print_json(traced.to_dict())
    else:
        echo(traced)
    return WRONG if traced.wrong or any(call.verdict == DIFFERS for call in traced.calls) else 0


def batch_for(
    classifier: "Classifier", photograph: Path | None, shape: str | None, seed: int, device: str = "cpu"
) -> Any:
    """Return a photograph as a batch of one on a device, or random numbers of a shape, or of the model's own.

    Raises:
        InputError: a shape beside a photograph, or one that is not understood; no such device.
    """
    from ..errors import InputError
    from ..frameworks.base import capability, framework_of_model
    from ..photographs import on_device

    if photograph is not None and shape is not None:
        raise InputError("--shape is for a random input; leave it out beside an IMAGE")
    device = on_device(classifier, device)
    if photograph is not None:
        return classifier.prepare(photograph, device)
    arrays = capability(framework_of_model(classifier.module), "arrays")
    random = arrays.batch(list(_random(_own_shape(classifier), seed)), device)
    return random if shape is None else arrays.like(_random(_numbers(shape), seed), random)


def _numbers(shape: str) -> tuple[int, ...]:
    from ..errors import InputError

    sizes = re.split("[,x×]", shape)
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise InputError(f"--shape {shape!r} is not understood; write positive numbers, as in 1,3,224,224")
    return tuple(map(int, sizes))


def _own_shape(classifier: "Classifier") -> tuple[int, ...]:
    crop = classifier.preprocessing.crop
    height, width = (crop, crop) if isinstance(crop, int) else crop
    return (1, 3, height, width)


def _random(shape: tuple[int, ...], seed: int) -> Any:
    import numpy as np

    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
