"""How pixels are scaled for a network, by name: what `--preprocess` takes and what the commands print.

    0..1  -1..1  0..255    red, green and blue scaled to that range, and nothing else
    imagenet               0 to 1, less ImageNet's mean, over its standard deviation
    caffe                  0 to 255, blue first, less ImageNet's mean

Of keras.applications VGG and ResNet take "caffe", DenseNet "imagenet", the later ones -1..1, or 0..255 where layers of
theirs scale. With `@SIDE` or `@HEIGHTxWIDTH` also the size: the shorter side is resized to it, and the centre cropped.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .errors import InputError, did_you_mean, printable
from .images import Preprocessing

SCALES: dict[str, dict[str, Any]] = {
    "0..1": {"mean": (0.0,) * 3, "std": (1.0,) * 3, "order": "RGB"},
    "-1..1": {"mean": (0.5,) * 3, "std": (0.5,) * 3, "order": "RGB"},
    "0..255": {"mean": (0.0,) * 3, "std": (1 / 255,) * 3, "order": "RGB"},
    "imagenet": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "order": "RGB"},
    "caffe": {"mean": (123.68 / 255, 116.779 / 255, 103.939 / 255), "std": (1 / 255,) * 3, "order": "BGR"},
}
FORMS = f"{', '.join(SCALES)}, or one of them with a size, as in 0..1@32"


@dataclass(frozen=True)
class Scaling:
    """A scale of pixels, and a size where one was given: `(side, side)` or `(height, width)`.

    Attributes:
        word: as it was written.
        fields: mean, std and order, as `Preprocessing` has them.
    """

    word: str
    fields: Mapping[str, Any]
    size: tuple[int, int] | None = None

    @classmethod
    def parse(cls, word: str) -> "Scaling":
        """Read a word of the grammar above.

        Raises:
            InputError: it is none.

        >>> Scaling.parse("-1..1@32x48").applied(Preprocessing()).crop
        (32, 48)
        """
        name, _, size = word.strip().partition("@")
        sides = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", size)
        if name.lower() not in SCALES:
            hint = did_you_mean(name, SCALES)
            raise InputError(f"no way to preprocess is called {printable(word)!r}{hint}; there are {FORMS}")
        if "@" in word and sides is None:
            raise InputError(
                f"{printable(word)!r} has no size after @; a size is SIDE or HEIGHTxWIDTH, as in {name}@224"
            )
        return cls(word, SCALES[name.lower()], (int(sides[1]), int(sides[2] or sides[1])) if sides else None)

    def applied(self, preprocessing: Preprocessing) -> Preprocessing:
        """Return a preprocessing with this scale, and this size where there is one."""
        scaled = replace(preprocessing, **self.fields)
        if self.size is None:
            return scaled
        side = self.size[0] if self.size[0] == self.size[1] else self.size
        return replace(scaled, resize=side, crop=side)


def describe(preprocessing: Preprocessing) -> str:
    """Describe the size and the scale of a network's input in a few words.

    >>> describe(Preprocessing()), describe(Preprocessing(32, 32, (0.5, 0.4, 0.3), (0.2, 0.2, 0.25)))
    ('224 x 224 imagenet', '32 x 32 RGB less (0.5, 0.4, 0.3) over (0.2, 0.2, 0.25)')
    """
    crop = preprocessing.crop
    height, width = (crop, crop) if isinstance(crop, int) else crop
    scale = next((word for word, fields in SCALES.items() if _is_scale(preprocessing, fields)), None)
    if scale is None:
        mean, std = (
            f"({', '.join(f'{value:.4g}' for value in row)})" for row in (preprocessing.mean, preprocessing.std)
        )
        scale = f"{preprocessing.order} less {mean} over {std}"
    return f"{height} x {width} {scale}"


def _is_scale(preprocessing: Preprocessing, fields: Mapping[str, Any]) -> bool:
    pairs = ((preprocessing.mean, fields["mean"]), (preprocessing.std, fields["std"]))
    return preprocessing.order == fields["order"] and all(np.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in pairs)
