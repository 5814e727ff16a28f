"""The verb: ask six questions about a map, and sum the answers up in a sentence."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt

from ..attribution import estimators
from ..attribution.explain import explain
from ..errors import InputError, UndertowError
from ..frameworks.base import bound, capability, framework_of_input
from ..outputs import Path
from ..rules import resolve
from ..tables import ActivationRule, Rule
from .evaluation import Cost, Evaluation, MapFunction, check_maps, check_target
from .null import Null
from .result import QUESTIONS, Answer, Verdict, verdict_sentence

Array = npt.NDArray[Any]
SAMPLES = 19
NO_EXPLAINER = "the map was given as an array; pass explainer= to make others"


@final
@dataclass(frozen=True)
class Trust:
    """Ask whether a map deserves belief: does it depend on the class, on the weights, on more than edges; do its
    pixels carry the score; does it stay under noise; do backward directions stay distinct?

    `undertow.trust` is the one instance: `ut.trust(...)` judges a map of `ut.explain`, `ut.trust.of_map(...)` any
    array, `ut.trust.cost(...)` returns beforehand what it will take.
    """

    def __call__(
        self,
        model: Any,
        x: Any,
        *,
        rule: str | ActivationRule | Rule = "guided",
        estimator: str = "gradient",
        target: int | None = None,
        names: Sequence[str] | None = None,
        seed: int = 0,
        samples: int = SAMPLES,
        output: Path | None = None,
        advance: Callable[[int], object] = lambda _: None,
    ) -> Verdict:
        """Judge the map that `ut.explain` makes of one image.

        The model, its weights, hooks and modes and the random state are as before afterwards: weights are
        initialised anew in copies. The same seed gives the same verdict.

        Args:
            model: as `ut.explain` takes it, in eval mode; scores `(B, classes)`. The weights of a plain function are
                out of reach, so that question stays unanswered.
            x: one image, `(1, C, H, W)`, or `(1, H, W, C)` to Keras. For a batch: `[ut.trust(model, image[None]) for
                image in x]`.
            rule, estimator: as `ut.explain` takes them.
            target: a class id; None is the predicted one.
            names: of the classes, for the sentences.
            seed: of the random maps, classes, weights and noise.
            samples: how many random maps stand for chance; 19 are the fewest that can tell at 5 %.
            output: the part of the model's output that holds the scores, as `ut.explain` takes it.
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
        resolved = estimators.resolve(estimator)
        evaluation = _evaluation(
            model,
            x,
            target=target,
            names=names,
            seed=seed,
            samples=samples,
            output=output,
            advance=advance,
            map_function=own_map_function(rule, estimator, seed, output),
            passes_per_map=resolved.passes,
        )
        original = evaluation.compute_maps(evaluation.image[None], [evaluation.target])[0]
        plain = name == "gradient" and resolved.kind == "gradient"
        null = Null.of(original, samples, seed)
        questions: dict[str, Callable[[], Answer]] = {
            "class": lambda: evaluation.ask_class(original, null, compare=not plain),
            "weights": lambda: evaluation.ask_weights(original, null),
            "input": lambda: evaluation.ask_input(original),
            "faithfulness": lambda: evaluation.ask_faithfulness(original),
            "stability": lambda: evaluation.ask_stability(original, null),
            "convergence": lambda: evaluation.ask_convergence(rule, resolved),
        }
        return _verdict(evaluation, original, questions, rule=name, estimator=resolved.name, started=started)

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
        output: Path | None = None,
        advance: Callable[[int], object] = lambda _: None,
    ) -> Verdict:
        """Judge a map that another tool made, or that a person believes in.

        Args:
            model: a callable from images `(B, C, H, W)` to scores `(B, classes)`.
            x: the image, `(1, C, H, W)`.
            values: its map: `(H, W)`, `(C, H, W)`, `(1, H, W)` or `(1, C, H, W)`, an array or a tensor; channels last
                where the model has them so.
            explainer: the tool's function `(model, images, class ids) -> maps`, for the questions that need other maps
                (class, weights, stability); without it those stay unanswered. Convergence always does: it is about
                a rule of this library.
            target, names, seed, samples, output, advance: as `ut.trust`.

        Raises:
            InputError: the map's shape does not fit the image; else as `ut.trust`.

        >>> import torch, undertow as ut
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)).eval()
        >>> verdict = ut.trust.of_map(net, torch.randn(1, 1, 8, 8), torch.rand(8, 8))
        >>> sorted(verdict.answers), verdict.unanswered["class"]
        (['faithfulness', 'input'], 'the map was given as an array; pass explainer= to make others')
        """
        started = time.perf_counter()
        evaluation = _evaluation(
            *(model, x),
            target=target,
            names=names,
            seed=seed,
            samples=samples,
            output=output,
            advance=advance,
            map_function=explainer,
        )
        array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
        maps = array[None] if array.ndim == 2 or array.shape[0] != 1 else array
        original = check_maps(maps, 1, evaluation.image.shape[-2:], evaluation.channels_last)[0]
        questions: dict[str, Callable[[], Answer]] = {
            "input": lambda: evaluation.ask_input(original),
            "faithfulness": lambda: evaluation.ask_faithfulness(original),
        }
        if explainer is not None:
            null = Null.of(original, samples, seed)
            questions |= {
                "class": lambda: evaluation.ask_class(original, null, compare=False),
                "weights": lambda: evaluation.ask_weights(original, null),
                "stability": lambda: evaluation.ask_stability(original, null),
            }
        unanswered = {name: NO_EXPLAINER for name in ("class", "weights", "stability") if explainer is None}
        unanswered["convergence"] = "it is about a rule of this library, and the map was given as an array"
        return _verdict(evaluation, original, questions, started=started, unanswered=unanswered)

    def cost(
        self,
        model: Any,
        x: Any,
        *,
        rule: str | ActivationRule | Rule = "guided",
        estimator: str = "gradient",
        target: int | None = None,
        samples: int = SAMPLES,
        output: Path | None = None,
    ) -> Cost:
        """Return what `ut.trust` with the same arguments will take: passes, and seconds from two timed of each.

        Raises:
            InputError, TargetError, ModelError, FrameworkError: as `ut.trust`.
        """
        name, _ = resolve(rule)
        resolved = estimators.resolve(estimator)
        evaluation = _evaluation(
            model, x, target=target, samples=samples, output=output, passes_per_map=resolved.passes
        )
        return evaluation.cost(plain=name == "gradient" and resolved.kind == "gradient")


def own_map_function(rule: str | ActivationRule | Rule, estimator: str, seed: int, output: Path | None) -> MapFunction:
    """Return the function that computes the maps of a rule and an estimator."""
    options: dict[str, Any] = {"rule": rule, "estimator": estimator, "seed": seed, "output": output}
    return lambda model, x, target: explain(model, x, target=target, **options).numpy()


def _evaluation(model: Any, x: Any, *, target: Any, samples: int, output: Path | None, **settings: Any) -> Evaluation:
    """Check what a verdict is asked about, and compute the image's scores.

    Args:
        settings: further attributes of `Evaluation`.
    """
    model = bound(model)
    framework = framework_of_input(x, model)
    inspector = capability(framework, "inspect.layers")
    shape = tuple(x.shape)
    if len(shape) != 4 or shape[0] != 1:
        raise InputError(f"x has shape {shape}; a verdict is about one image, (1, C, H, W): pass image[None] of each")
    if samples < SAMPLES:
        raise InputError(f"samples={samples} are too few: {SAMPLES} are the fewest that can tell at 5 %")
    scores = inspector.scores(model, x, output)[0]
    evaluation = Evaluation(
        arrays=capability(framework, "arrays"),
        inspector=inspector,
        model=model,
        x=x,
        target=check_target(target, scores),
        scores=scores,
        samples=samples,
        output=output,
        **settings,
    )
    if evaluation.names is not None and len(evaluation.names) != len(scores):
        raise InputError(f"there are {len(evaluation.names)} names for {len(scores)} classes")
    evaluation.advance(1)
    return evaluation


def _verdict(
    evaluation: Evaluation,
    original: Array,
    questions: dict[str, Callable[[], Answer]],
    *,
    rule: str = "given",
    estimator: str = "given",
    started: float,
    unanswered: dict[str, str] | None = None,
) -> Verdict:
    """Ask the questions; one that fails for this network says why, and the others are asked all the same."""
    answers: dict[str, Answer] = {}
    unanswered = dict(unanswered or {})
    for question in QUESTIONS:
        if question in questions:
            try:
                answers[question] = questions[question]()
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
