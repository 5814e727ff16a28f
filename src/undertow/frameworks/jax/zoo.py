"""Networks in JAX by reference: what a user's function returned, `jax:FILE.py:FUNCTION`. There are none by name."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ...classifier import Classifier, Reference
from ...errors import ModelError, one_line
from ...images import Preprocessing
from ...scales import Scaling
from ..base import AS_IS, bound
from .arrays import batch
from .explain import forward_scores
from .models import JaxNetwork, network_of


def names() -> list[str]:
    """List no network: JAX has no collection of its own."""
    return []


def rows(source: str, word: str | None) -> list[Reference]:
    """List no reference."""
    return []


def load(
    source: str,
    name: str,
    weights: str,
    file: Path | None,
    output: str | int | None = None,
    classes: str | Sequence[str] | None = None,
) -> Classifier:
    """Refuse: there is no network by name.

    Raises:
        ModelError: always.
    """
    raise ModelError(f"jax:{name} names no network; write jax:FILE.py:FUNCTION, a function that returns one")


@contextmanager
def seeded() -> Iterator[None]:
    """Do nothing: random numbers of JAX have keys."""
    yield


def from_object(
    reference: str,
    network: Any,
    file: Path | None,
    scaling: Scaling | None = None,
    output: str | int | None = None,
) -> Classifier:
    """Complete what a user's function returned: a network, or a mapping or `Classifier` with one.

    A network is whatever `undertow.explain` takes, `(B, H, W, 3)` float32 to scores `(B, classes)`; an Equinox module
    takes one image `(3, H, W)`.

    Raises:
        ModelError: something else was returned, the network does not run, or the parts do not fit.
    """
    if file is not None:
        raise ModelError(f"{reference} must load its weights itself: no file of weights is read for JAX; leave it out")
    if isinstance(network, Classifier):
        output = network.output if output is None else output
        network = {"module": network.module, "preprocessing": network.preprocessing, "classes": network.classes}
    parts = dict(network) if isinstance(network, Mapping) else {"module": network}
    module, given, classes = (parts.pop(key, None) for key in ("module", "preprocessing", "classes"))
    path = parts.pop("output", None) if output is None else output
    module = bound(module)
    if parts or not callable(module):
        wrong = f"unknown {', '.join(map(str, parts))}" if parts else type(module).__name__
        raise ModelError(f"{reference} must return a network, or a dict with module, preprocessing, classes, output, "
                         f"not {wrong}")  # fmt: skip
    told_by = "by default, as most ImageNet networks" if given is None else "returned with the network"
    preprocessing = given if isinstance(given, Preprocessing) else Preprocessing(**dict(given or {}))
    preprocessing = preprocessing if scaling is None else scaling.applied(preprocessing)
    wrapped = replace(of_photographs(network_of(module)), wrap=of_photographs)
    count = _count_classes(reference, wrapped, preprocessing, path)
    if classes is not None and len(classes) != count:
        raise ModelError(f"{reference} names {len(classes)} classes but scores {count}; give one name for each score")
    first, others = _named(count if classes is None else classes)
    digest = weights_sha256(wrapped)
    made = Classifier(reference, wrapped, preprocessing, first, f"made by {reference}", digest, others, told_by)
    return replace(made, output=path)


def of_photographs(network: JaxNetwork) -> JaxNetwork:
    """Return a network as one of images `(B, H, W, C)`, which those of Equinox are not."""
    if network.channels_last is not False:
        return network

    def function(weights: Sequence[Any], args: Any, kwargs: Any, training: bool) -> Any:
        return network.function(weights, tuple(jnp.moveaxis(x, -1, 1) for x in args), kwargs, training)

    key = None if network.key is None else ("photographs", network.key)
    return replace(network, function=function, key=key, channels_last=True)


def weights_sha256(network: JaxNetwork) -> str:
    """Return the SHA-256 of a network's weights: of each its path, dtype, shape, values; random keys are left out."""
    digest = hashlib.sha256()
    for path, weight in zip(network.paths, network.weights, strict=True):
        if not jnp.issubdtype(weight.dtype, jax.dtypes.prng_key):
            array = np.ascontiguousarray(weight)
            digest.update(f"{path}\0{array.dtype}\0{'x'.join(map(str, array.shape))}\0".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()


def _named(classes: Any) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Return each class's name and its synonyms; numbers where only their count is known."""
    if isinstance(classes, int):
        classes = [f"class {i}" for i in range(classes)]
    listed = [(names,) if isinstance(names, str) else tuple(map(str, names)) for names in classes]
    return tuple(names[0] for names in listed), tuple(names[1:] for names in listed)


def _count_classes(reference: str, network: JaxNetwork, preprocessing: Preprocessing, output: str | int | None) -> int:
    """Return how many scores the network gives for one photograph, by running it on a black one."""
    black = batch([preprocessing.array(Image.new("RGB", (64, 64)))], f"{jax.devices()[0].platform}:0")
    try:
        return int(forward_scores(network, black, output, AS_IS).shape[1])
    except Exception as error:
        remedy = "return a dict with its own preprocessing, or say its size, as in --preprocess imagenet@32"
        raise ModelError(f"{reference} does not run on an input {black.shape} ({one_line(error)}); {remedy}") from error
