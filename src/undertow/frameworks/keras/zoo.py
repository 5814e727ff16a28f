"""Keras classifiers by reference: those of keras.applications, saved models, and what a user's function returns."""

import os
import random
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

from ...classifier import RANDOM, Classifier, Reference, imagenet_names
from ...errors import FrameworkError, ModelError, did_you_mean, one_line, printable
from ...images import Preprocessing
from ...outputs import head_of
from ...scales import SCALES, Scaling
from ..base import keras_backend
from ..downloading import downloaded
from .calls import refuse_other_backends
from .layers import weights_sha256
from .pixels import GUESS, pixel_scale

_MOST_UNPACKED = 256 << 20
_UNPACKED_SHARE = 20
"""Bytes that a file of Keras's may unpack to: so many, and so many times its own size; Keras itself packs nothing."""
_HUB = "https://storage.googleapis.com/tensorflow/keras-applications/"


def names() -> list[str]:
    """List every network of keras.applications."""
    return [name for name in dir(keras.applications) if name[0].isupper()]


def rows(source: str, word: str | None) -> list[Reference]:
    """List the references that contain a word: each network with ImageNet weights, and with random ones."""
    references = []
    for name in names():
        cached = _is_cached(name)
        why = "downloaded already" if cached else "needs a download"
        references.append(Reference(f"{source}:{name}", source, "ImageNet", cached, why))
        references.append(Reference(f"{source}:{name}@none", source, RANDOM, True, "nothing to download"))
    return [row for row in references if not word or word.lower() in row.reference.lower()]


def load(
    source: str,
    name: str,
    weights: str,
    file: Path | None,
    output: str | int | None = None,
    classes: str | Sequence[str] | None = None,
) -> Classifier:
    """Load a classifier of keras.applications ("keras"), or a model that Keras saved ("file").

    Args:
        name: as `keras.applications` has it, or the path of a .keras file.
        weights: "" for ImageNet weights, "none" for random ones.
        file: weights to use instead.
        classes: of no use here.

    Raises:
        ModelError: an unknown name, or weights that cannot be downloaded or do not fit; a saved model that is
            missing, unreadable, holds code (a lambda layer) or is no image classifier.
        FrameworkError: Keras does not run on TensorFlow.
    """
    return _from_saved(name, file, output) if source == "file" else _from_applications(name, weights, file)


def _from_applications(name: str, choice: str, file: Path | None) -> Classifier:
    """Load a classifier of keras.applications without its softmax, with that network's own preprocessing."""
    _refuse_torch()
    refuse_other_backends()
    if name not in names():
        hint = did_you_mean(name, names()) or "; `undertow models keras:` lists them"
        raise ModelError(f"keras has no classifier '{printable(name)}'{hint}")
    if choice not in ("", "none", "imagenet"):
        raise ModelError(f"keras:{name} has no weights '{printable(choice)}'; it has imagenet and none (random)")
    build = getattr(keras.applications, name)
    reference = f"keras:{name}" + ("@none" if choice == "none" else "")
    trained = not file and choice != "none"
    module = _build_trained(build, reference) if trained else _build_untrained(build)
    if file:
        _load_weights(module, file, reference)
    weights = file.name if file else "ImageNet" if trained else RANDOM
    told_by = f"preprocess_input of {name}"
    return _classifier(reference, module, own_preprocessing(build, module), imagenet_names(), weights, told_by)


def _refuse_torch() -> None:
    """Refuse references where Keras runs on torch, whose photographs have their channels first.

    Raises:
        FrameworkError: it does.
    """
    if keras_backend() == "torch":
        raise FrameworkError(
            "keras runs on torch here, where references to its models are not read; set KERAS_BACKEND=tensorflow, or "
            "pass the model itself to ut.explain"
        )


def _build_trained(build: Callable[..., Any], reference: str) -> Any:
    url = None if _is_cached(build.__name__) else _HUB
    return downloaded(reference, url, lambda: build(weights="imagenet", classifier_activation=None))


def _is_cached(name: str) -> bool:
    """Whether Keras has downloaded weights of a network before; their files are named like it, but for `_`."""
    home = Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser()
    files = (home / "models").glob("*")
    return any(file.name.replace("_", "").lower().startswith(name.lower()) for file in files)


@contextmanager
def seeded() -> Iterator[None]:
    """Draw random weights from seed 0 inside; Keras draws the seeds of its initialisers from Python's `random`."""
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


def _build_untrained(build: Callable[..., Any]) -> Any:
    with seeded():
        return build(weights=None, classifier_activation=None)


def own_preprocessing(build: Callable[..., Any], module: Any) -> Preprocessing:
    """Return the network's own `preprocess_input`: it is affine in each channel, so three colours determine it."""
    preprocess_input = sys.modules[build.__module__].preprocess_input
    black, red, white = (
        preprocess_input(np.array(pixel, np.float32).reshape(1, 1, 1, 3)).reshape(3).astype(np.float64)
        for pixel in ((0, 0, 0), (255, 0, 0), (255, 255, 255))
    )
    scale = white - black
    mean, std = (tuple(float(value) for value in row) for row in (-black / scale, 1 / scale))
    order = "RGB" if red[0] != black[0] else "BGR"
    if order == "BGR":
        mean, std = mean[::-1], std[::-1]
    return _square_crop(module, mean=mean, std=std, order=order)


def _square_crop(module: Any, **options: Any) -> Preprocessing:
    """Resize the shorter side to the network's input and crop the centre, like Keras's `keep_aspect_ratio`."""
    shape = module.input_shape[1:3] if keras.config.image_data_format() == "channels_last" else module.input_shape[2:4]
    height, width = (224 if side is None else int(side) for side in shape)
    crop = height if height == width else (height, width)
    return Preprocessing(crop, crop, **options)


def _from_saved(reference: str, file: Path | None, output: str | int | None) -> Classifier:
    """Load a model that Keras saved, without running any code in the file."""
    path = Path(reference).expanduser()
    _refuse_torch()
    refuse_other_backends()
    name = printable(path)
    _refuse_unreadable(path, name)
    _refuse_bomb(path, name)
    try:
        module = keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:
        raise ModelError(f"{name} {_unreadable(error)}") from error
    if file:
        _load_weights(module, file, reference)
    return _complete(reference, module, None, file.name if file else path.name, output)


def _refuse_unreadable(path: Path, name: str) -> None:
    """Refuse what is no model that Keras saved, or holds code, in `.h5` too, where Keras may run it."""
    if path.is_dir():
        raise ModelError(
            f"{name} is a SavedModel, in which Keras finds no layers: save the model with model.save('FILE.keras'), or "
            f"in Python, with saved = tf.saved_model.load({str(path)!r}), pass saved.serve to undertow.explain"
        )
    if not path.is_file():
        raise ModelError(f"no model {name}: there is no such file")
    if path.suffix.lower() == ".keras":
        if not zipfile.is_zipfile(path):
            raise ModelError(f"{name} is no readable .keras file, which is a zip archive; save it with model.save")
        return
    if not h5py.is_hdf5(path):
        raise ModelError(f"{name} is no readable HDF5 file; save the model with model.save('FILE.keras')")
    with h5py.File(path) as content:
        config = content.attrs.get("model_config")
    if config is None:
        raise ModelError(
            f"{name} holds weights alone; pass them as --weights {name} beside the --model that they belong to"
        )
    if '"Lambda"' in (config.decode() if isinstance(config, bytes) else str(config)):
        raise ModelError(f"{name} {_unreadable(ValueError('lambda'))}")


def _refuse_bomb(path: Path, name: str) -> None:
    """Refuse an archive, or weights in it, that unpack to very much more than they take, by the sizes they declare.

    Raises:
        ModelError: they do, or the sizes cannot be read.
    """
    limit = _MOST_UNPACKED + _UNPACKED_SHARE * path.stat().st_size
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                declared = sum(member.file_size for member in archive.infolist())
                if declared <= limit:
                    for member in archive.namelist():
                        if member.endswith(".h5"):
                            with archive.open(member) as file:
                                declared += _declared_by(file)
        else:
            declared = _declared_by(path)
    except Exception as error:  # a damaged file can raise nearly anything in some decoder
        raise ModelError(f"{name} is no readable file of Keras's ({one_line(error)[:120]}); save it again") from error
    if declared > limit:
        raise ModelError(f"{name} would unpack to {declared:,} bytes, from {path.stat().st_size:,}; that is no network")


def _declared_by(file: Any) -> int:
    """Return how many bytes the arrays in an HDF5 file take.

    Raises:
        ValueError: it names other files to read them from.
    """
    items: list[Any] = []
    links: list[Any] = []
    with h5py.File(file, "r") as content:
        content.visititems_links(lambda _, link: links.append(link))
        content.visititems(lambda _, item: items.append(item))
        arrays = [item for item in items if isinstance(item, h5py.Dataset)]
        outside = [array for array in arrays if array.external or array.is_virtual]
        if outside or any(isinstance(link, h5py.ExternalLink) for link in links):
            raise ValueError("it reads other files")
        return sum(int(array.nbytes) for array in arrays)


def _unreadable(error: Exception) -> str:
    text = one_line(error)
    if "unsafe" in text or "lambda" in text.lower():
        return "holds a lambda, which is code and is never run; load it yourself in FILE.py:FUNCTION if you trust it"
    if "deserialize" in text or "custom" in text.lower():
        return "holds custom layers; load it in FILE.py:FUNCTION, where their classes are defined"
    return f"cannot be loaded ({text[:120]}); save it with model.save('FILE.keras')"


def from_object(
    reference: str,
    network: Any,
    file: Path | None,
    scaling: Scaling | None = None,
    output: str | int | None = None,
) -> Classifier:
    """Return the classifier of a Keras model, or of a mapping or `Classifier` with one.

    No size of a picture need be known beforehand, so `scaling` is left to `undertow.models.load`.

    Raises:
        ModelError: the network is no classifier of images, or its class names or weights do not fit.
    """
    return _complete(reference, network, file, file.name if file else f"made by {reference}", output)


def _complete(reference: str, network: Any, file: Path | None, weights: str, output: str | int | None) -> Classifier:
    if isinstance(network, Classifier):
        output = network.output if output is None else output
        network = {"module": network.module, "preprocessing": network.preprocessing, "classes": network.classes}
    parts = dict(network) if isinstance(network, Mapping) else {"module": network}
    module, preprocessing, classes = (parts.pop(key, None) for key in ("module", "preprocessing", "classes"))
    path = parts.pop("output", None) if output is None else output
    if parts or not isinstance(module, keras.Model):
        wrong = f"unknown {', '.join(map(str, parts))}" if parts else type(module).__name__
        raise ModelError(f"{reference} must return a keras.Model, or a dict with module, preprocessing, classes, "
                         f"output, not {wrong}")  # fmt: skip
    if file:
        _load_weights(module, file, reference)
    told_by = "returned with the network"
    if not isinstance(preprocessing, Preprocessing):
        preprocessing, told_by = _preprocessing_from(reference, module, preprocessing)
    count = _count_classes(reference, module, path)
    if classes is not None and len(classes) != count:
        raise ModelError(f"{reference} names {len(classes)} classes but scores {count}; give one name for each score")
    class_names = [f"class {index}" for index in range(count)] if classes is None else classes
    rows = tuple((name,) if isinstance(name, str) else tuple(map(str, name)) for name in class_names)
    return replace(_classifier(reference, module, preprocessing, rows, weights, told_by), output=path)


def _preprocessing_from(reference: str, module: Any, options: Any) -> tuple[Preprocessing, str]:
    """Return the preprocessing that a user's options describe, or, where they are None, the model itself; and which."""
    if len(getattr(module, "input_shape", None) or ()) != 4:
        raise ModelError(
            f"{reference} does not take one batch of images; undertow.explain takes any input, from Python"
        )
    if options is not None:
        return Preprocessing(**dict(options)), "returned with the network"
    scale, told_by = pixel_scale(module)
    return _square_crop(module, **SCALES[scale]), told_by


def _count_classes(reference: str, module: Any, output: str | int | None) -> int:
    shape = getattr(module, "output_shape", None)
    shape = shape if output is None else head_of(shape, output)
    if not isinstance(shape, tuple) or len(shape) != 2 or not isinstance(shape[1], int):
        remedy = "; name one output, as in --output 0" if isinstance(shape, list | Mapping) else ""
        raise ModelError(f"{reference} must give scores of shape (B, classes), not {shape}{remedy}")
    return shape[1]


def _load_weights(module: Any, file: Path, reference: str) -> None:
    if not file.is_file() or file.stat().st_size == 0:
        reason = "it is empty" if file.is_file() else "there is no such file"
        raise ModelError(f"no weights in {printable(file)}: {reason}")
    _refuse_bomb(file, printable(file))
    try:
        module.load_weights(file)
    except Exception as error:
        text = one_line(error)[:160]
        raise ModelError(f"{printable(file)} does not fit {reference} ({text}); Keras reads .weights.h5") from error


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
    return Classifier(
        *(reference, module, preprocessing, first, weights, digest, others),
        preprocessing_from=told_by,
        guessed=told_by == GUESS,
    )
