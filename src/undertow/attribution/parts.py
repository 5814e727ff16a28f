"""What there is to see of an attribution: its scores, and its maps in little or their strongest positions."""

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..display import Part, Pictures, ShownTable, brief, counted, shape_of
from ..frameworks.base import AS_IS, as_numpy
from ..show import heatmap, tiles
from ..structures import tensors_with_paths

if TYPE_CHECKING:
    from PIL.Image import Image

TILES = 8  # small heatmaps of one result
Sample = tuple[int, int]
"""A position in the batch, and one among the sample's targets."""


def parts(a: Any) -> Iterator[Part]:
    """Yield the parts of an `Attribution`."""
    batch, count = _batch(a)
    each = f", {count} targets each" if count > 1 else ""
    yield f"Attribution of {counted(batch, 'sample')}{each}: {a.rule}, estimator {a.estimator}"
    yield "; ".join(_facts(a))
    drawn = next(_images(a), None) is not None
    if drawn:
        rest = batch * count - TILES
        note = f"the first {TILES}; .image(sample, target) draws any, .overlay(photograph) over its photograph"
        yield Pictures(lambda: islice(_tiles(a), TILES), note if rest > 0 else "")
    if not batch:
        return
    told = bool(_strongest(a, (0, 0)))  # some map is no image
    headings = ("sample", "target", "score", *(("strongest",) if told else ()))
    rows = ((str(s[0]), label(a, s), _score(a, s), *((_strongest(a, s),) if told else ())) for s in _samples(a))
    yield ShownTable(headings, rows, batch * count)


def strip_of(a: Any) -> "Image | None":
    """Return the first maps side by side; None of maps that are no images."""
    images = [image for _, image in islice(_tiles(a), TILES)]
    return tiles.strip(images) if images else None


def label(a: Any, sample: Sample) -> str:
    """Return what was explained of a sample: the class's name, where it is known, and its id."""
    if a.targets is None:
        return "function"
    class_id = int(as_numpy(a.targets).reshape(_batch(a))[sample])
    return f"{a.names[class_id]} ({class_id})" if class_id in a.names else str(class_id)


def _facts(a: Any) -> Iterator[str]:
    """Yield in words what else is to be known of the maps."""
    shapes = [f"{path} {shape_of(tensor)}".strip() for path, tensor in tensors_with_paths(a.values)]
    yield f"values {brief(shapes)}" if shapes else "no values"
    yield f"{counted(a.rewired, 'call')} rewired"
    for name in ("skipped", "opaque", "acting"):
        if counts := getattr(a, name):
            yield f"{name}: {brief(counts)}"
    if a.head != AS_IS:
        yield f"head {a.head}"
    if a.at:
        yield f"at {brief(a.at)}"
    if a.completeness is not None:
        yield f"completeness within {np.abs(as_numpy(a.completeness)).max():.2g}"


def _batch(a: Any) -> tuple[int, int]:
    """Return the numbers of samples and of targets each."""
    shape = tuple(a.scores.shape)
    return (int(shape[0]), int(shape[1])) if len(shape) == 2 else (int(shape[0]) if shape else 1, 1)


def _samples(a: Any) -> Iterator[Sample]:
    batch, count = _batch(a)
    return ((sample, target) for sample in range(batch) for target in range(count))


def _score(a: Any, sample: Sample) -> str:
    return f"{float(as_numpy(a.scores).reshape(_batch(a))[sample]):.4g}"


def _maps(a: Any, sample: Sample) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield the maps of a sample and target, with their paths; a list of images has one for each sample."""
    batch, count = _batch(a)
    several, index = len(a.scores.shape) == 2, sample[0]
    is_list = isinstance(a.values, list) and len(a.values) == batch
    for path, tensor in tensors_with_paths(a.values):
        if is_list and len(tensor.shape) == 3 + several and int(tensor.shape[0]) in (1, 3):
            if path == str(index):
                yield "", as_numpy(tensor[:, sample[1]] if several else tensor)
        elif tuple(tensor.shape[: 1 + several]) == ((batch, count) if several else (batch,)):
            yield path, as_numpy(tensor[index])[sample[1]] if several else as_numpy(tensor[index])


def _images(a: Any) -> Iterator[tuple[str, heatmap.Map]]:
    """Yield the planes `(C, H, W)` of the maps that are images, in order, each with its caption."""
    for sample in _samples(a):
        if a.layout is not None:  # of a layer, laid over the image
            yield f"{sample[0]}: {label(a, sample)}", a.map(*sample)
            continue
        for path, values in _maps(a, sample):
            for what, plane in tiles.planes(values, a.channels_last):
                yield ", ".join(filter(None, (f"{sample[0]}: {label(a, sample)}", path, what))), plane


def _tiles(a: Any) -> Iterator[tuple[str, "Image"]]:
    return ((caption, tiles.tile(plane)) for caption, plane in _images(a))


def _strongest(a: Any, sample: Sample) -> str:
    """Return the strongest positions of a sample's maps that are no images; of embeddings `(T, E)` those of tokens."""
    texts = []
    for path, values in _maps(a, sample):
        if tiles.planes(values, a.channels_last):
            continue
        axes = 1 if a.at and values.ndim == 2 else values.ndim
        places = ", ".join(f"[{place}] {value:.3g}" for place, value in tiles.strongest(values, axes))
        texts.append(f"{path}: {places}" if path else places)
    return "; ".join(texts)
