"""One image under evaluation: the maps and scores that each question needs, and how many passes they take."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..attribution.estimators import Estimator
from ..attribution.explain import explain
from ..errors import InputError, ModelError, TargetError
from ..frameworks.base import Arrays, Inspector, Request, as_numpy
from ..outputs import Path
from ..rules import resolve
from ..tables import ActivationRule, AttentionRule, Rule
from . import class_, convergence, faithfulness, input, stability, weights
from .null import Null
from .result import Answer

Array = npt.NDArray[Any]
MapFunction = Callable[[Any, Any, list[int]], Any]
MAX_BATCH = 4  # images in one pass: more take longer each on a CPU, and cost memory


@dataclass(frozen=True)
class Cost:
    """What a verdict will take.

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


@dataclass(kw_only=True)
class Evaluation:
    """One image, its network and class: computes maps and scores for the questions, and counts the passes.

    Attributes:
        x: the image as the framework's tensor, `(1, C, H, W)`, or `(1, H, W, C)` where the model takes those; `image`
            is the same as NumPy, `(C, H, W)`.
        scores: of the image, `(classes,)`.
        map_function: from a model, n images as it takes them and their class ids to maps, laid out as the images are or
            `(n, H, W)`; None where a map was given and nothing can compute another.
        output: the part of the model's output that holds the scores, as `undertow.explain` takes it.
        passes_per_map: how often an image goes forward and backward for one map.
        advance: called with the number of passes done.
    """

    arrays: Arrays
    inspector: Inspector
    model: Any
    x: Any
    target: int
    scores: Array
    names: Sequence[str] | None = None
    seed: int = 0
    samples: int
    map_function: MapFunction | None = None
    output: Path | None = None
    passes_per_map: int = 1
    advance: Callable[[int], object] = lambda _: None
    passes: dict[str, int] = field(default_factory=lambda: {"forward": 1, "backward": 0})

    def __post_init__(self) -> None:
        self.channels_last = self.inspector.channels_last(self.model, self.x)
        image = as_numpy(self.x)[0].astype(np.float32)
        self.image: npt.NDArray[np.float32] = np.moveaxis(image, -1, 0) if self.channels_last else image

    def name(self, class_id: int) -> str:
        """Name a class."""
        return self.names[class_id] if self.names is not None else f"class {class_id}"

    def _batch(self, images: Array) -> Any:
        """Return images `(n, C, H, W)` as the model takes them."""
        return self.arrays.like(np.moveaxis(images, 1, -1) if self.channels_last else images, self.x)

    def _scores(self, x: Any) -> Array:
        return self.inspector.scores(self.model, x, self.output)

    def _gradient_map(self, model: Any, x: Any, target: list[int]) -> Any:
        """Return the plain gradient's maps, whatever rule is judged."""
        return explain(model, x, rule="gradient", target=target, output=self.output).numpy()

    def count(self, kind: str, images: int) -> None:
        """Count images that went through the network."""
        self.passes[kind] += images
        self.advance(images)

    def compute_maps(
        self, images: Array, class_ids: Sequence[int], model: Any = None, map_function: MapFunction | None = None
    ) -> list[Array]:
        """Return the map of each image for its class, `(C, H, W)` each, a few images in one pass."""
        compute = map_function or self.map_function
        assert compute is not None  # questions that need maps are not asked without a map function
        maps: list[Array] = []
        for start in range(0, len(images), MAX_BATCH):
            batch = images[start : start + MAX_BATCH]
            batch_ids = list(class_ids[start : start + MAX_BATCH])
            values = compute(self.model if model is None else model, self._batch(batch), batch_ids)
            maps += list(check_maps(values, len(batch), self.image.shape[-2:], self.channels_last))
            self.count("backward", len(batch) * (1 if map_function else self.passes_per_map))
        return maps

    def target_scores(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Return the explained class's score of each image, `(n,)`."""
        scores = []
        for start in range(0, len(images), MAX_BATCH):
            batch = images[start : start + MAX_BATCH]
            scores.append(self._scores(self._batch(batch))[:, self.target])
            self.count("forward", len(batch))
        return np.concatenate(scores).astype(np.float64)

    def ask_class(self, original: Array, null: Null, compare: bool) -> Answer:
        """Explain other classes; `compare` adds the plain gradient's maps of the same classes."""
        roles = class_.other_classes(self.scores, self.target, self.seed)
        if not roles:
            raise InputError("the model has one class alone")
        maps = dict(zip(roles, self._maps_of_classes(list(roles)), strict=True))
        class_ids = [self.target, *roles]
        plain = self._maps_of_classes(class_ids, self._gradient_map) if compare else []
        names = {i: self.name(i) for i in class_ids}
        return class_.answer(original, maps, roles, names, self.target, null, plain)

    def _maps_of_classes(self, class_ids: Sequence[int], map_function: MapFunction | None = None) -> list[Array]:
        return self.compute_maps(np.stack([self.image] * len(class_ids)), class_ids, map_function=map_function)

    def ask_weights(self, original: Array, null: Null) -> Answer:
        """Initialise layers anew, from the top down and one at a time."""
        layers = self.inspector.layers(self.model, self.x)
        self.count("forward", 1)
        if not layers:
            raise InputError("the model is a plain function or has no layers that could be initialised anew")
        steps = weights.cascade(layers)
        cascaded = [(names[-1], len(names), self._map_after_reinitializing(names)) for names in steps]
        single = [(names[-1], len(names), self._map_after_reinitializing(names[-1:])) for names in steps]
        return weights.answer(original, cascaded, single, len(layers), null)

    def _map_after_reinitializing(self, layers: list[str]) -> Array:
        twin = self.inspector.reinitialized(self.model, layers, self.seed)
        return self.compute_maps(self.image[None], [self.target], model=twin)[0]

    def ask_input(self, original: Array) -> Answer:
        """Compare the map with the image's edges."""
        return input.answer(original, self.image, self.samples, self.seed)

    def ask_faithfulness(self, original: Array) -> Answer:
        """Take pixels away in the map's order."""
        return faithfulness.answer(original, self.image, self.target_scores, self.samples, self.seed)

    def ask_stability(self, original: Array, null: Null) -> Answer:
        """Add small noise."""
        noisy = stability.noisy(self.image, stability.DRAWS, self.seed)
        maps = self.compute_maps(noisy, [self.target] * len(noisy))
        return stability.answer(original, maps, stability.RADIUS, null, self.seed)

    def ask_convergence(self, rule: str | ActivationRule | Rule, estimator: Estimator) -> Answer:
        """Send random directions back; where a map ends at a layer, to that layer."""
        name, function = resolve(rule)
        if isinstance(function, AttentionRule):
            raise InputError(f"rule {name!r} sends nothing back")
        choices = "graph", "relu-like", False, self.output
        request = Request(self.model, (self.x,), function, name, None, *choices)
        layers = self.inspector.layers(self.model, self.x)
        self.count("forward", 1)
        cam_layer = estimator.layer if estimator.kind == "grad-cam" else ""
        if cam_layer:
            layers = [cam_layer]
        n_depths = min(convergence.DEPTHS, len(layers))
        depths = np.unique(np.linspace(0, len(layers) - 1, n_depths).round().astype(int))
        drawn = np.random.default_rng(self.seed).standard_normal((convergence.DIRECTIONS, self.scores.size))
        arrived = self.inspector.layer_gradients(request, [layers[i] for i in depths], drawn.astype(np.float32))
        self.count("backward", convergence.DIRECTIONS)
        gradients = {layer: values[0] for layer, values in arrived.gradients.items() if layer in layers}
        return convergence.answer(gradients, gradients.get(cam_layer, arrived.at_input[0]), self.samples, self.seed)

    def cost(self, plain: bool) -> Cost:
        """Count the passes of a whole verdict, and estimate their time from two of each kind.

        Args:
            plain: the map is the plain gradient, which is then not computed for comparison.
        """
        n_classes = len(class_.other_classes(self.scores, self.target, self.seed))
        n_steps = len(weights.cascade(self.inspector.layers(self.model, self.x)))
        n_maps = 1 + n_classes + 2 * n_steps + stability.DRAWS
        n_compared = 0 if plain else 1 + n_classes
        backward = self.passes_per_map * n_maps + n_compared + convergence.DIRECTIONS
        forward = 3 + faithfulness.n_images(self.samples)
        self._gradient_map(self.model, self.x, [self.target])  # the first pass of a process is slow
        forward_seconds = _seconds(lambda: self._scores(self.x))
        backward_seconds = _seconds(lambda: self._gradient_map(self.model, self.x, [self.target]))
        return Cost(forward, backward, forward * forward_seconds + backward * backward_seconds)


def check_maps(values: Any, count: int, size: tuple[int, ...], channels_last: bool = False) -> Array:
    """Return maps as `(count, C, H, W)`, from an array or tensor with or without channels.

    Args:
        channels_last: those with channels are `(count, H, W, C)`.

    Raises:
        InputError: they are not of that many images, or of another size. ModelError: one is not finite.
    """
    array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    array = array[:, None] if array.ndim == 3 else array
    is_last = channels_last and np.ndim(values) == 4
    first = np.moveaxis(array, -1, 1) if is_last else array
    if array.ndim != 4 or len(array) != count or first.shape[-2:] != tuple(size):
        wanted = (count, *size, "channels") if is_last else (count, "channels", *size)
        raise InputError(f"maps have shape {array.shape}; they must be ({', '.join(map(str, wanted))})")
    if not np.isfinite(array).all():
        raise ModelError("a map holds NaN or infinity; check the model's weights")
    return first


def check_target(target: Any, scores: Array) -> int:
    """Return the explained class: the given one, or that of the highest score.

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


def _seconds(run: Callable[[], object]) -> float:
    """Time a pass; the shorter of two, since other work on the machine can only make one longer."""
    times = []
    for _ in range(2):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)
