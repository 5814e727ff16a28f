"""Networks of transformers, by a name on the hub or from a folder: with their own preprocessing, tokenizer and labels.

No code that comes with a model is ever run, and no pickle is unpacked.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ....classifier import RANDOM, Classifier, Reference
from ....errors import FrameworkError, InputError, ModelError, one_line, printable
from ....images import Preprocessing
from ...downloading import unreachable
from ..texts import predicted_by_class, text_model
from ..weights import fit, read_state, weights_sha256
from .importing import import_package, import_torchvision
from .zero_shot import ZeroShot, features_of, pooled, texts_of

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_READ = (
    "classifiers of images and texts (ForImageClassification, ForSequenceClassification), language models "
    "(ForCausalLM, ForConditionalGeneration), and networks that score texts for an image (CLIP, SigLIP)"
)
_OF_TEXTS = ("CLIPModel", "MetaClip2Model", "SiglipModel")
CONFIG = "config.json"


@dataclass(frozen=True)
class _Place:
    """Where a model is: a folder, or a name on the hub with a revision."""

    reference: str
    path: str
    revision: str | None = None
    local: bool = True

    def options(self) -> dict[str, Any]:
        """Return what every `from_pretrained` is given."""
        return {"trust_remote_code": False, "revision": self.revision or "main", "local_files_only": self.local}


def load_from_hub(name: str, file: Path | None, classes: str | Sequence[str] | None = None) -> Classifier:
    """Load `hf:NAME_OR_FOLDER[@revision]`; with `@none` the weights are random.

    Args:
        file: weights to use instead of its own.
        classes: the texts that a CLIP scores, as `texts_of` takes them.

    Returns:
        A `Classifier` of photographs, or a `TextModel`.

    Raises:
        FrameworkError: transformers is missing.
        ModelError: it cannot be had, is none of the kinds that are read, or its weights are not whole.
    """
    transformers = _transformers()
    folder, at, revision = name.rpartition("@")
    if not at or Path(name).expanduser().is_dir():
        folder, revision = name, ""
    untrained = revision == "none"
    with _quiet(transformers):
        place = _place(folder, "" if untrained else revision)
        config = _loaded(place, transformers.AutoConfig)
        architecture, predicts = _architecture(place, config)
        if classes is not None and predicts != "texts":
            raise InputError(f"{place.reference} has classes of its own: leave --classes or classes= out")
        if predicts == "next token" and getattr(config, "is_encoder_decoder", False):
            predicts = "next token of a decoder"
        automatic = getattr(transformers, {
            "image": "AutoModelForImageClassification",
            "class": "AutoModelForSequenceClassification",
            "next token": "AutoModelForCausalLM",
            "next token of a decoder": "AutoModelForSeq2SeqLM",
            "texts": "AutoModelForZeroShotImageClassification",
        }[predicts])  # fmt: skip
        names, texts = texts_of(classes, place.reference) if predicts == "texts" else ((), [])
        module = _module(place, automatic, config, architecture, file, untrained)
        weights = file.name if file else RANDOM if untrained else _weights(place)
        reference = f"hf:{name}"
        if predicts == "texts":
            module = _zero_shot(module, _tokenizer(place, transformers), texts)
        elif predicts != "image":
            return text_model(module, _tokenizer(place, transformers), reference, weights)
        preprocessing = _preprocessing(place, transformers, config)
    if predicts == "image":
        labels = {int(i): str(label) for i, label in config.id2label.items()}
        names = tuple((labels.get(i, f"class {i}"),) for i in range(config.num_labels))
    return Classifier(
        reference,
        module,
        preprocessing or Preprocessing(*_sizes(config), (0.0,) * 3, (1.0,) * 3),
        tuple(row[0] for row in names),
        weights,
        weights_sha256(module),
        tuple(row[1:] for row in names),
        preprocessing_from="its own image processor's" if preprocessing else "a size of its configuration",
        guessed=preprocessing is None,
    )


def _transformers() -> Any:
    with suppress(FrameworkError):
        import_torchvision()  # which transformers imports where it is installed, and a CPU-only torch lacks operators
    return import_package("transformers", "text")


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep transformers from bars and advice on stderr; what was set before is set again."""
    log = transformers.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _place(name: str, revision: str) -> _Place:
    """Find a model: a folder, in the cache, or on the hub.

    Raises:
        ModelError: there is no such folder, the name is none, or the hub does not answer.
    """
    path, shown = Path(name).expanduser(), printable(name)
    if name and path.is_dir():
        if not (path / CONFIG).is_file():
            raise ModelError(f"hf:{shown} has no {CONFIG}; save_pretrained(folder) writes one")
        return _Place(f"hf:{shown}", str(path))
    if path.is_file():
        raise ModelError(f"hf:{shown} is a file; give its folder, hf:{printable(path.parent)}")
    if not _NAME.fullmatch(name) or name.startswith("."):
        raise ModelError(f"there is no folder {shown}; a reference is hf:FOLDER, or hf:NAME of the hub, as in hf:gpt2")
    hub = import_package("huggingface_hub", "text")
    reference = f"hf:{shown}" + (f"@{printable(revision)}" if revision else "")
    if isinstance(hub.try_to_load_from_cache(name, CONFIG, revision=revision or None), str):
        return _Place(reference, name, revision or None)
    reason = "HF_HUB_OFFLINE is set" if hub.constants.HF_HUB_OFFLINE else unreachable(hub.constants.ENDPOINT)
    if reason:
        raise ModelError(
            f"could not download {reference} ({reason}), and it is no folder here; save it where there is a network, "
            "by save_pretrained(FOLDER) of the model and of its tokenizer or image processor, and give hf:FOLDER"
        )
    return _Place(reference, name, revision or None, local=False)


def _loaded(place: _Place, automatic: Any) -> Any:
    """Load a configuration, a tokenizer or an image processor."""
    try:
        return automatic.from_pretrained(place.path, **place.options())
    except Exception as error:
        raise _failed(place, error, automatic.__name__.removeprefix("Auto").lower()) from error


def _tokenizer(place: _Place, transformers: Any) -> Any:
    """Load a tokenizer.

    Raises:
        ModelError: there is none, or not whole: transformers would make one that knows no word.
    """
    tokenizer = _loaded(place, transformers.AutoTokenizer)
    own = type(tokenizer).vocab_files_names.values()
    names = sorted({"tokenizer.json", *own}) if own else ["tokenizer_config.json"]  # one of bytes has no vocabulary
    if not any(_has(place, name) for name in names):
        raise ModelError(
            f"{place.reference} has no tokenizer ({', '.join(names)}); tokenizer.save_pretrained(FOLDER) writes it"
        )
    return tokenizer


def _has(place: _Place, name: str) -> bool:
    """Whether a file is in the folder, or in the cache, into which what there is was downloaded."""
    if Path(place.path).is_dir():
        return (Path(place.path) / name).is_file()
    hub = import_package("huggingface_hub", "text")
    return isinstance(hub.try_to_load_from_cache(place.path, name, revision=place.revision), str)


def _failed(place: _Place, error: Exception, what: str) -> ModelError:
    text = one_line(error)
    if "trust_remote_code" in text or "custom code" in text:
        return ModelError(
            f"{place.reference} comes with code of its own, which is never run; load it yourself, and give the network "
            "as FILE.py:FUNCTION, or to ut.explain in Python"
        )
    return ModelError(f"could not load the {what} of {place.reference} ({text[:300]}); save_pretrained writes it")


def _architecture(place: _Place, config: Any) -> tuple[str, str]:
    """Return the class that was saved and what it predicts: "image", "class", "next token" or "texts".

    Raises:
        ModelError: it is none of these.
    """
    names = [str(name) for name in getattr(config, "architectures", None) or ()]
    for name in names:
        if "ForImageClassification" in name:
            return name, "image"
        if name in _OF_TEXTS:
            return name, "texts"
        if predicts := predicted_by_class(name):
            return name, predicts
    saved = f"is a {', '.join(map(printable, names))}" if names else "does not say in its configuration what it is"
    raise ModelError(f"{place.reference} {saved}; what is read are {_READ}")


def _module(
    place: _Place, automatic: Any, config: Any, architecture: str, file: Path | None, untrained: bool
) -> torch.nn.Module:
    """Build the network, float32, with its weights, those of a file, or random ones.

    Raises:
        ModelError: weights are missing or do not fit: a head would be left random.
    """
    if file or untrained:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            module: torch.nn.Module = automatic.from_config(config, trust_remote_code=False, dtype=torch.float32)
        if file:
            fit(module, read_state(file), file, place.reference)
        return module.eval()
    try:
        module, loading = automatic.from_pretrained(
            place.path, dtype=torch.float32, output_loading_info=True, **place.options()
        )
    except Exception as error:
        raise _failed(place, error, "weights") from error
    lacking = sorted({*loading["missing_keys"], *(row[0] for row in loading["mismatched_keys"])})
    if lacking:
        names = ", ".join(map(printable, lacking[:3])) + ", ..." * (len(lacking) > 3)
        raise ModelError(
            f"{place.reference} has no weights for {names} of {architecture}: they would be "
            "random; name a trained one, or hf:...@none for random weights"
        )
    return module.eval()


def _zero_shot(model: Any, tokenizer: Any, texts: Sequence[str]) -> torch.nn.Module:
    """Return the part of a CLIP or SigLIP that reads images, with a head of the texts' features."""
    longest = model.config.text_config.max_position_embeddings
    siglip = type(model).__name__.startswith("Siglip")  # trained on texts padded to the full length, without a mask
    how = {"padding": "max_length" if siglip else True, "truncation": True, "max_length": longest}

    def tokens(listed: list[str]) -> torch.Tensor:
        ids: torch.Tensor = tokenizer(listed, return_tensors="pt", **how)["input_ids"]
        return ids

    def encode(ids: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = getattr(model, "text_projection", torch.nn.Identity())(pooled(model.text_model(ids)))
        return features

    projection = getattr(model, "visual_projection", torch.nn.Identity())
    bias = float(model.logit_bias.detach()) if siglip else 0.0
    scale = float(model.logit_scale.detach().exp())
    return ZeroShot(model.vision_model, projection, features_of(texts, tokens, encode), scale, bias).eval()


def _weights(place: _Place) -> str:
    return f"revision {place.revision}" if place.revision else "its own"


def _sizes(config: Any) -> tuple[Any, Any]:
    size = getattr(getattr(config, "vision_config", config), "image_size", 224) or 224
    side = size if isinstance(size, int) else tuple(int(side) for side in size)
    return side, side


def _preprocessing(place: _Place, transformers: Any, config: Any) -> Preprocessing | None:
    """Return the preprocessing of a model's own image processor, None where it has none.

    Raises:
        ModelError: the processor does what no `Preprocessing` says.
    """
    if place.local and Path(place.path).is_dir() and not (Path(place.path) / "preprocessor_config.json").is_file():
        return None
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(place.path, backend="pil", **place.options())
    except Exception as error:
        raise _failed(place, error, "image processor") from error
    kind = type(processor).__name__
    try:
        preprocessing = preprocessing_of(processor.to_dict())
    except (LookupError, TypeError, ValueError, ModelError) as error:
        raise ModelError(_unlike(place, kind)) from error
    if not _agrees(preprocessing, processor):
        raise ModelError(_unlike(place, kind))
    return preprocessing


def _unlike(place: _Place, kind: str) -> str:
    return (
        f"{place.reference}: what its {kind} does to a photograph is no resize, centre crop and scale; return the "
        "network from FILE.py:FUNCTION, with a Preprocessing that suits it"
    )


def preprocessing_of(settings: Mapping[str, Any]) -> Preprocessing:
    """Return what the settings of an image processor of transformers mean.

    >>> settings = {"size": {"height": 32, "width": 48}, "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255}
    >>> preprocessing_of(settings).resize
    (32, 48)
    """
    size, crop_size = settings["size"], settings.get("crop_size")
    side = size.get("shortest_edge")
    resize: Any = side or (size["height"], size["width"])
    crop: Any = (crop_size["height"], crop_size["width"]) if crop_size and settings.get("do_center_crop") else resize
    if side and settings.get("crop_pct"):
        resize = int(side / settings["crop_pct"])
        crop = crop_size["height"] if crop_size else side
        if side >= 384 and not crop_size:  # ConvNeXt's are squashed from there on
            resize = (side, side)
    factor = 255 * settings["rescale_factor"] if settings.get("do_rescale") else 255.0
    shift = 1.0 if settings.get("rescale_offset") else 0.0
    mean, std = [0.0] * 3, [1.0] * 3
    if settings.get("do_normalize"):
        mean, std = list(settings["image_mean"]), list(settings["image_std"])
        if settings.get("include_top"):  # EfficientNet's are divided twice
            std = [s * s for s in std]
    return Preprocessing(
        resize,
        crop,
        tuple((m + shift) / factor for m in mean),
        tuple(s / factor for s in std),
        Image.Resampling(settings["resample"]).name.lower(),
        "BGR" if settings.get("do_flip_channel_order") else "RGB",
        "down",
    )


def _agrees(preprocessing: Preprocessing, processor: Any) -> bool:
    """Whether both make the same of two pictures, one wide and one tall."""
    generator = np.random.default_rng(0)
    for height, width in ((211, 333), (340, 225)):
        picture = Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8)).resize((width, height))
        theirs = np.asarray(processor(picture, return_tensors="np")["pixel_values"][0], np.float32)
        ours = preprocessing.array(picture)
        if ours.shape != theirs.shape or not np.allclose(ours, theirs, rtol=0, atol=1e-4 / min(preprocessing.std)):
            return False
    return True


def rows_of_hub(word: str | None) -> list[Reference]:
    """Return the rows of `undertow models` for "hf": what is in the hub's cache here, by name."""
    _transformers()
    overview = Reference("hf:NAME_OR_FOLDER", "hf", "", False, "transformers'; a folder works offline")
    names = [f"hf:{name}" for name in cached_names()]
    rows = [Reference(name, "hf", "its own", True, "downloaded already") for name in names]
    return [row for row in rows if word.lower() in row.reference.lower()] if word else [overview]


def cached_names() -> list[str]:
    """Return the models in the hub's cache."""
    hub = import_package("huggingface_hub", "text")
    folder = Path(os.environ.get("HF_HUB_CACHE", hub.constants.HF_HUB_CACHE))
    return sorted(path.name.removeprefix("models--").replace("--", "/") for path in folder.glob("models--*"))
