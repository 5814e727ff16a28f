"""Networks of images and texts (CLIP, SigLIP) as classifiers: the score of a class is that of its text."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....classifier import imagenet_names
from ....errors import InputError, ModelError, printable

IMAGENET = "imagenet"
PROMPT = "a photo of a {}."
"""The text of a class of ImageNet; classes that a user names are texts as they stand."""
_AT_ONCE = 64  # texts in one pass

Names = tuple[tuple[str, ...], ...]


class ZeroShot(nn.Module):
    """The scores of texts for images: scale * cosine(image, text) + bias, `(B, 3, H, W)` to `(B, texts)`.

    The features of the texts were computed once, and are the weights of `head`: what reads texts is left out.

    Args:
        visual: from images to features, or to an output of transformers that has them as `pooler_output`.
        projection: of those features, to as many as the texts have.
        features: of the texts, `(texts, features)`.
        scale, bias: of the cosine, a number each.

    Source: Radford et al. 2021, arXiv 2103.00020; with a bias Zhai et al. 2023, arXiv 2303.15343.

    >>> scorer = ZeroShot(nn.Flatten(), nn.Identity(), torch.tensor([[0.0, 2.0]]), 10.0)
    >>> scorer(torch.tensor([[[3.0, 4.0]]])).item()  # the cosine of (3, 4) and (0, 2) is 0.8
    8.0
    """

    def __init__(self, visual: nn.Module, projection: nn.Module, features: Tensor, scale: float, bias: float = 0.0):
        super().__init__()
        self.visual, self.projection = visual, projection
        self.head = nn.Linear(features.shape[1], len(features), bias=bool(bias))
        with torch.no_grad():
            self.head.weight.copy_(scale * F.normalize(features, dim=-1))
            if bias:
                self.head.bias.fill_(bias)

    def forward(self, images: Tensor) -> Tensor:
        """Score every text."""
        features = self.projection(pooled(self.visual(images)))
        scores: Tensor = self.head(F.normalize(features, dim=-1))
        return scores


def pooled(output: Any) -> Any:
    """Return the features of a whole image or text: of a tower's output, or the first of several, as CoCa gives."""
    if isinstance(output, Tensor):
        return output
    return output.pooler_output if hasattr(output, "pooler_output") else output[0]


def texts_of(classes: str | Sequence[str] | None, reference: str) -> tuple[Names, list[str]]:
    """Return the names of the classes, each with its synonyms, and their texts.

    Args:
        classes: the texts, or "imagenet" for its 1,000 classes, each as "a photo of a NAME.".

    Raises:
        ModelError: there is none. InputError: one is empty, or is there twice.
    """
    if classes is None:
        raise ModelError(
            f"{reference} scores any text: name the classes, as in --classes 'a photo of a cat, a photo of a dog', "
            "--classes FILE.txt with one a line, or --classes imagenet; in Python classes=[...]"
        )
    if classes == IMAGENET:
        rows = imagenet_names()
        return rows, [PROMPT.format(row[0]) for row in rows]
    texts = [str(text).strip() for text in classes]
    if not texts or not all(texts):
        raise InputError("a class is a text, and one is empty; name each, as in 'a photo of a cat'")
    if twice := next((text for i, text in enumerate(texts) if text in texts[:i]), None):
        raise InputError(f"the class {printable(twice)!r} is there twice; leave one out")
    return tuple((text,) for text in texts), texts


def features_of(texts: Sequence[str], tokens: Callable[[list[str]], Any], encode: Callable[[Any], Tensor]) -> Tensor:
    """Return the features of texts, `(texts, features)`, some at once.

    Args:
        tokens: from texts to token ids, cut where they are too long.
        encode: from these to features.

    Raises:
        ModelError: a text is longer than the network reads.
    """
    for text in texts:
        if torch.equal(tokens([text]), tokens([f"{text} cat"])):
            raise ModelError(
                f"the class {printable(text[:60])!r} has as many tokens as the network reads, or more; shorten it"
            )
    with torch.no_grad():
        parts = [encode(tokens(list(texts[i : i + _AT_ONCE]))) for i in range(0, len(texts), _AT_ONCE)]
    return torch.cat(parts)
