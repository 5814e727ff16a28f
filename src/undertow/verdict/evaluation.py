"""One image before the six questions: which maps and scores each needs, and how many passes that takes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..attribution import estimators
from ..attribution.explain import explain
from ..errors import InputError, ModelError, TargetError
from ..frameworks.base import Arrays, Inspector, Request
from ..rules import Rule, resolve
from . import class_, convergence, faithfulness, input, stability, weights
from .null import Null
from .result import Answer

Array = npt.NDArray[Any]
MapFunction = Callable[[Any, Any, list[int]], Any]
MAX_BATCH = 4  # images in one pass: more take longer each on a CPU, and cost memory


@dataclass(frozen=True)
class Cost:
    """What a verdict takes, said beforehand.

    Attributes:
        forward: images that go forward alone.
        backward: images that go forward and backward.
        seconds: an estimate from two timed passes of each kind, on this machine as it is now.
    """

    forward: int
    backward: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.forward} images forward, {self.backward} forward and backward, about {self.seconds:.0f} s"


@dataclass
class Evaluation:
    """What every question may ask for; it counts what goes through the network.

    Attributes:
        x: the image as the framework's tensor, `(1, C, H, W)`; `image` is the same as NumPy, `(C, H, W)`.
        explainer: from a model, images `(n, C, H, W)` and their n class ids to maps `(n, C, H, W)` or `(n, H, W)`; None
            where a map was given and nothing can make another.
        passes_per_map: how often an image goes forward and backward for one map.
        advance: called with the number of passes done.
    """

    arrays: Arrays
    inspector: Inspector
    model: Any
    x: Any
    target: int
    scores: Array
    names: Sequence[str] | None
    seed: int
    samples: int
    explainer: MapFunction | None = None
    passes_per_map: int = 1
    advance: Callable[[int], object] = lambda _: None
    passes: dict[str, int] = field(default_factory=lambda: {"forward": 1, "backward": 0})

    def __post_init__(self) -> None:
        self.image: npt.NDArray[np.float32] = self.arrays.to_numpy(self.x)[0].astype(np.float32)

    def name(self, class_id: int) -> str:
        """Name a class."""
        return self.names[class_id] if self.names is not None else f"class {class_id}"

    def count(self, kind: str, images: int) -> None:
        """Note that images went through the network."""
        self.passes[kind] += images
        self.advance(images)

    def maps(
        self, images: Array, ids: Sequence[int], model: Any = None, explainer: MapFunction | None = None
    ) -> list[Array]:
        """Return the map of each image for its class, a few images in one pass."""
        make = explainer or self.explainer
        assert make is not None  # questions that need maps are not asked without an explainer
        found: list[Array] = []
        for start in range(0, len(images), MAX_BATCH):
            some = images[start : start + MAX_BATCH]
            told = list(ids[start : start + MAX_BATCH])
            made = make(self.model if model is None else model, self.arrays.like(some, self.x), told)
            found += list(check_maps(made, len(some), self.image.shape[-2:]))
            self.count("backward", len(some) * (1 if explainer else self.passes_per_map))
        return found

    def target_scores(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Return the explained class's score of each image, `(n,)`."""
        found = []
        for start in range(0, len(images), MAX_BATCH):
            some = images[start : start + MAX_BATCH]
            found.append(self.inspector.scores(self.model, self.arrays.like(some, self.x))[:, self.target])
            self.count("forward", len(some))
        return np.concatenate(found).astype(np.float64)

    def ask_class(self, original: Array, null: Null, compare: bool) -> Answer:
        """Ask about other classes; `compare` asks the plain gradient about the same ones."""
        roles = class_.other_classes(self.scores, self.target, self.seed)
        if not roles:
            raise InputError("the model has one class alone")
        images = np.stack([self.image] * len(roles))
        maps = dict(zip(roles, self.maps(images, list(roles)), strict=True))
        ids = [self.target, *roles]
        plain = self.maps(np.stack([self.image] * len(ids)), ids, explainer=gradient_map) if compare else []
        names = {i: self.name(i) for i in ids}
        return class_.answer(original, maps, roles, names, self.target, null, plain)

    def ask_weights(self, original: Array, null: Null) -> Answer:
        """Initialise layers anew, from the top down and one at a time."""
        layers = self.inspector.layers(self.model, self.x)
        self.count("forward", 1)
        if not layers:
            raise InputError("the model is a plain function or has no layers that could be initialised anew")
        steps = weights.cascade(layers)
        cascaded = [(names[-1], len(names), self._reinitialized(names)) for names in steps]
        single = [(names[-1], len(names), self._reinitialized(names[-1:])) for names in steps]
        return weights.answer(original, cascaded, single, len(layers), null)

    def _reinitialized(self, names: list[str]) -> Array:
        twin = self.inspector.reinitialized(self.model, names, self.seed)
        return self.maps(self.image[None], [self.target], model=twin)[0]

    def ask_input(self, original: Array) -> Answer:
        """Compare the map with the image's edges."""
        return input.answer(original, self.image, self.samples, self.seed)

    def ask_faithfulness(self, original: Array) -> Answer:
        """Take pixels away in the map's order."""
        return faithfulness.answer(original, self.image, self.target_scores, self.samples, self.seed)

    def ask_stability(self, original: Array, null: Null) -> Answer:
        """Add small noise."""
        noisy = stability.noisy(self.image, stability.DRAWS, self.seed)
        maps = self.maps(noisy, [self.target] * len(noisy))
        return stability.answer(original, maps, stability.RADIUS, null, self.seed)

    def ask_convergence(self, rule: str | Rule, estimator: estimators.Estimator) -> Answer:
        """Send random directions back; where a map ends at a layer, to that layer."""
        name, function = resolve(rule)
        request = Request(self.model, (self.x,), function, name, None, "graph", "relu-like", False)
        every = self.inspector.layers(self.model, self.x)
        self.count("forward", 1)
        chosen = np.unique(np.linspace(0, len(every) - 1, min(convergence.DEPTHS, len(every))).round().astype(int))
        only = estimator.layer if estimator.kind == "grad-cam" else ""
        names = [only] if only else [every[i] for i in chosen]
        drawn = np.random.default_rng(self.seed).standard_normal((convergence.DIRECTIONS, self.scores.size))
        seen = self.inspector.layer_gradients(request, names, drawn.astype(np.float32))
        self.count("backward", convergence.DIRECTIONS)
        gradients = {at: g[0] for at, g in seen.gradients.items()}
        return convergence.answer(gradients, gradients.get(only, seen.at_input[0]), self.samples, self.seed)


def gradient_map(model: Any, x: Any, target: list[int]) -> Any:
    """Return the plain gradient's maps, whatever else is judged."""
    return explain(model, x, rule="gradient", target=target).numpy()


def check_maps(values: Any, count: int, size: tuple[int, ...]) -> Array:
    """Return maps as `(count, C, H, W)`, from an array or tensor with or without channels.

    Raises:
        InputError: they are not of that many images, or of another size.
    """
    array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    array = array[:, None] if array.ndim == 3 else array
    if array.ndim != 4 or len(array) != count or array.shape[-2:] != tuple(size):
        raise InputError(f"maps have shape {array.shape}; they must be ({count}, channels, {size[0]}, {size[1]})")
    if not np.isfinite(array).all():
        raise ModelError("a map holds NaN or infinity; check the model's weights")
    return array


def check_target(target: Any, scores: Array) -> int:
    """Return the class to judge by: the given one, or the highest score.

    Raises:
        TargetError: it is no class id of the model.
    """
    if target is None:
        return int(np.argmax(scores))
    if isinstance(target, bool) or not isinstance(target, int | np.integer):
        raise TargetError(f"target {target!r} is not understood; a verdict is about one class: pass its id, or None")
    if not 0 <= target < len(scores):
        raise TargetError(f"target {target} is out of range: the model has classes 0 to {len(scores) - 1}")
    return int(target)


def cost(evaluation: Evaluation, plain: bool) -> Cost:
    """Count the passes of a whole verdict, and estimate their time by two of each kind."""
    classes = len(class_.other_classes(evaluation.scores, evaluation.target, evaluation.seed))
    steps = len(weights.cascade(evaluation.inspector.layers(evaluation.model, evaluation.x)))
    maps = 1 + classes + 2 * steps + stability.DRAWS
    beside = 0 if plain else 1 + classes
    backward = evaluation.passes_per_map * maps + beside + convergence.DIRECTIONS
    forward = 3 + faithfulness.n_images(evaluation.samples)
    gradient_map(evaluation.model, evaluation.x, [evaluation.target])  # the first pass of a process is slow
    one_forward = _seconds(lambda: evaluation.inspector.scores(evaluation.model, evaluation.x))
    one_backward = _seconds(lambda: gradient_map(evaluation.model, evaluation.x, [evaluation.target]))
    return Cost(forward, backward, forward * one_forward + backward * one_backward)


def _seconds(run: Callable[[], object]) -> float:
    """Time a pass; the shorter of two, since whatever else the machine does only ever makes one longer."""
    times = []
    for _ in range(2):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)
