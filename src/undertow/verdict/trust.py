"""The verb: ask a map six questions, and say in a sentence what came of them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt

from ..attribution import estimators
from ..attribution.explain import explain
from ..errors import InputError, UndertowError
from ..frameworks.base import capability, framework_of_input
from ..rules import Rule, resolve
from .evaluation import Cost, Evaluation, MapFunction, check_maps, check_target
from .evaluation import cost as cost_of
from .null import Null
from .result import QUESTIONS, Answer, Verdict, verdict_sentence

Array = npt.NDArray[Any]
SAMPLES = 19
UNMADE = "the map was given as an array; pass explainer= to make others"


@final
@dataclass(frozen=True)
class Trust:
    """Ask whether a map deserves belief: does it depend on the class, on the weights, on more than edges; do its
    pixels carry the score; does it stay under noise; do backward directions stay distinct?

    `undertow.trust` is the one instance: `ut.trust(...)` judges a map of `ut.explain`, `ut.trust.of_map(...)` any
    array, `ut.trust.cost(...)` says beforehand what it takes.
    """

    def __call__(
        self,
        model: Any,
        x: Any,
        *,
        rule: str | Rule = "guided",
        estimator: str = "gradient",
        target: int | None = None,
        names: Sequence[str] | None = None,
        seed: int = 0,
        samples: int = SAMPLES,
        advance: Callable[[int], object] = lambda _: None,
    ) -> Verdict:
        """Judge the map that `ut.explain` makes of one image.

        The model, its weights, hooks and modes and the random state are as before afterwards: weights are drawn anew
        in copies. The same seed gives the same verdict.

        Args:
            model: as `ut.explain` takes it, in eval mode; scores `(B, classes)`. The weights of a plain function are
                out of reach, so that question stays unanswered.
            x: one image, `(1, C, H, W)`. For a batch: `[ut.trust(model, image[None]) for image in x]`.
            rule, estimator: as `ut.explain` takes them.
            target: a class id; None is the predicted one.
            names: of the classes, for the sentences.
            seed: of the random maps, classes, weights and noise.
            samples: how many random maps stand for chance; 19 are the fewest that can tell at 5 %.
            advance: called with the number of images that went through the network since the last call.

        Raises:
            InputError: x is no single image, or samples are too few. TargetError: no such class.
            ModelError, RuleError, FrameworkError: as `ut.explain` says.

        Source: each answer's `definition` and `source`.

        >>> import torch, undertow as ut
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(),
        ...                           torch.nn.Linear(4 * 14 * 14, 5)).eval()
        >>> verdict = ut.trust(net, torch.randn(1, 1, 16, 16), rule="gradient")
        >>> sorted(verdict.answers)
        ['class', 'convergence', 'faithfulness', 'input', 'stability', 'weights']
        >>> verdict.answers["class"].level in ("yes", "weak", "no")
        True
        """
        started = time.perf_counter()
        name, _ = resolve(rule)
        how = estimators.resolve(estimator)
        evaluation = _evaluate(
            model, x, target, names, seed, samples, advance, own_explainer(rule, estimator, seed), how.passes
        )
        original = evaluation.maps(evaluation.image[None], [evaluation.target])[0]
        plain = name == "gradient" and how.kind == "gradient"
        null = Null.of(original, samples, seed)
        asked: dict[str, Callable[[], Answer]] = {
            "class": lambda: evaluation.ask_class(original, null, compare=not plain),
            "weights": lambda: evaluation.ask_weights(original, null),
            "input": lambda: evaluation.ask_input(original),
            "faithfulness": lambda: evaluation.ask_faithfulness(original),
            "stability": lambda: evaluation.ask_stability(original, null),
            "convergence": lambda: evaluation.ask_convergence(rule, how),
        }
        return _verdict(evaluation, original, asked, {}, name, how.name, started)

    def of_map(
        self,
        model: Any,
        x: Any,
        values: Any,
        *,
        explainer: MapFunction | None = None,
        target: int | None = None,
        names: Sequence[str] | None = None,
        seed: int = 0,
        samples: int = SAMPLES,
        advance: Callable[[int], object] = lambda _: None,
    ) -> Verdict:
        """Judge a map that another tool made, or that a person believes in.

        Args:
            model: a callable from images `(B, C, H, W)` to scores `(B, classes)`.
            x: the image, `(1, C, H, W)`.
            values: its map: `(H, W)`, `(C, H, W)`, `(1, H, W)` or `(1, C, H, W)`, an array or a tensor.
            explainer: `(model, images, class ids) -> maps` as the tool makes them, for the questions that need other
                maps (class, weights, stability); without it those stay unanswered. Convergence always does: it is
                about a rule of this library.
            target, names, seed, samples, advance: as `ut.trust`.

        Raises:
            InputError: the map's shape does not fit the image; else as `ut.trust`.

        >>> import torch, undertow as ut
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)).eval()
        >>> verdict = ut.trust.of_map(net, torch.randn(1, 1, 8, 8), torch.rand(8, 8))
        >>> sorted(verdict.answers), verdict.unanswered["class"]
        (['faithfulness', 'input'], 'the map was given as an array; pass explainer= to make others')
        """
        started = time.perf_counter()
        evaluation = _evaluate(model, x, target, names, seed, samples, advance, explainer, 1)
        array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
        original = check_maps(
            array[None] if array.ndim == 2 or array.shape[0] != 1 else array, 1, evaluation.image.shape[-2:]
        )[0]
        asked: dict[str, Callable[[], Answer]] = {
            "input": lambda: evaluation.ask_input(original),
            "faithfulness": lambda: evaluation.ask_faithfulness(original),
        }
        if explainer is not None:
            null = Null.of(original, samples, seed)
            asked |= {
                "class": lambda: evaluation.ask_class(original, null, compare=False),
                "weights": lambda: evaluation.ask_weights(original, null),
                "stability": lambda: evaluation.ask_stability(original, null),
            }
        unasked = {name: UNMADE for name in ("class", "weights", "stability") if explainer is None}
        unasked["convergence"] = "it is about a rule of this library, and the map was given as an array"
        return _verdict(evaluation, original, asked, unasked, "given", "given", started)

    def cost(
        self,
        model: Any,
        x: Any,
        *,
        rule: str | Rule = "guided",
        estimator: str = "gradient",
        target: int | None = None,
        samples: int = SAMPLES,
    ) -> Cost:
        """Say what `ut.trust` with the same arguments takes: passes, and seconds by two timed passes of each kind.

        Raises:
            InputError, TargetError, ModelError, FrameworkError: as `ut.trust`.
        """
        name, _ = resolve(rule)
        how = estimators.resolve(estimator)
        evaluation = _evaluate(model, x, target, None, 0, samples, lambda _: None, None, how.passes)
        return cost_of(evaluation, plain=name == "gradient" and how.kind == "gradient")


def own_explainer(rule: str | Rule, estimator: str, seed: int) -> MapFunction:
    """Return what makes the maps of a rule and an estimator."""

    def make(model: Any, x: Any, target: list[int]) -> Any:
        return explain(model, x, rule=rule, estimator=estimator, target=target, seed=seed).numpy()

    return make


def _evaluate(
    model: Any,
    x: Any,
    target: Any,
    names: Sequence[str] | None,
    seed: int,
    samples: int,
    advance: Callable[[int], object],
    explainer: MapFunction | None,
    passes_per_map: int,
) -> Evaluation:
    framework = framework_of_input(x, model)
    inspector = capability(framework, "inspect.layers")
    shape = tuple(x.shape)
    if len(shape) != 4 or shape[0] != 1:
        raise InputError(f"x has shape {shape}; a verdict is about one image, (1, C, H, W): pass image[None] of each")
    if samples < SAMPLES:
        raise InputError(f"samples={samples} are too few: {SAMPLES} are the fewest that can tell at 5 %")
    scores = inspector.scores(model, x)[0]
    chosen = check_target(target, scores)
    if names is not None and len(names) != len(scores):
        raise InputError(f"there are {len(names)} names for {len(scores)} classes")
    advance(1)
    arrays = capability(framework, "arrays")
    return Evaluation(
        arrays, inspector, model, x, chosen, scores, names, seed, samples, explainer, passes_per_map, advance
    )


def _verdict(
    evaluation: Evaluation,
    original: Array,
    asked: dict[str, Callable[[], Answer]],
    unasked: dict[str, str],
    rule: str,
    estimator: str,
    started: float,
) -> Verdict:
    """Ask; a question that this network cannot be asked says why, and does not keep the others from being asked."""
    answers: dict[str, Answer] = {}
    unanswered = dict(unasked)
    for question in QUESTIONS:
        if question in asked:
            try:
                answers[question] = asked[question]()
            except UndertowError as error:
                unanswered[question] = str(error)
    return Verdict(
        answers=answers,
        unanswered=unanswered,
        sentence=verdict_sentence(answers, unanswered),
        rule=rule,
        estimator=estimator,
        target=evaluation.target,
        target_name=evaluation.name(evaluation.target),
        seed=evaluation.seed,
        samples=evaluation.samples,
        passes=dict(evaluation.passes),
        seconds=round(time.perf_counter() - started, 3),
        values=original,
    )


trust = Trust()
