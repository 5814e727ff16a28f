"""`undertow.prepare`: a copy of a network that gives the same maps sooner, as measured here and now."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..classifier import Classifier
from ..errors import InputError, UndertowError, did_you_mean, one_line
from ..frameworks.base import as_numpy, capability, framework_of_model
from ..structures import tensors_with_paths
from .explain import explain

PRECISIONS = ("float32", "bfloat16", "auto")
LIMITS = {"float32": 5e-3, "bfloat16": 0.1}
"""How far maps may differ, as ‖difference‖ / ‖map‖: by rounding, and by the gates near zero that rounding opens or
closes. Folding changes a map of the packaged EfficientNet by 0.3 %, and by 1e-9 in float64."""
GAIN = 0.97  # of the seconds before, that a step must not exceed to be worth taking
ROUNDS = 3
HOPELESS = 1.5  # times the seconds before, in its first timed call: not measured any further
HALF = "bfloat16"


@dataclass(frozen=True)
class Trial:
    """One step that was tried.

    Attributes:
        step: its name.
        taken: whether it is part of the prepared copy.
        reason: why, or why not.
        seconds, before: of a map of the example with it and without it; None where it was not measured.
        difference: of the maps from those of the plain network, ‖difference‖ / ‖map‖; None likewise.
    """

    step: str
    taken: bool
    reason: str
    seconds: float | None = None
    before: float | None = None
    difference: float | None = None

    def __str__(self) -> str:
        return f"{self.step}: {'taken' if self.taken else 'not taken'}, {self.reason}"


@dataclass(frozen=True)
class Prepared:
    """A prepared copy.

    Attributes:
        model: what to pass to `undertow.explain`: frozen, with the steps taken.
        steps: the steps that were taken.
        trials: what was measured of each.
    """

    model: Any
    steps: tuple[str, ...]
    trials: tuple[Trial, ...]

    def __str__(self) -> str:
        return "\n".join([", ".join(("frozen", *self.steps)), *map(str, self.trials)])


def prepare(model: Any, example: Any, precision: str = "float32", rule: Any = "guided") -> Prepared:
    """Make a copy of a network that explains sooner on this machine: it is measured, never assumed.

    The copy is frozen. Batch norms are folded into the layers before them, weights are laid out with their channels
    last, and autocast to bfloat16 is put around it, each only where a map of the example comes sooner by 3 % and agrees
    with that of the plain network: to 0.5 % in float32, to 10 % in bfloat16, as ‖difference‖ / ‖map‖. The original is
    left alone. Layers within the copy may compute something else than those of the original: record and diagnose that.

    Args:
        model: a `torch.nn.Module` in eval mode, or a `Classifier`, whose module is prepared.
        example: a batch of real inputs, of the size that will be used.
        precision: "float32"; "auto" tries bfloat16 too; "bfloat16" takes it wherever the maps agree, quicker or not.
        rule: of the maps that are compared.

    Raises:
        InputError: an argument that cannot be used.
        ModelError: the network's framework has no such steps.

    >>> import torch
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    >>> fast = prepare(net.eval(), torch.randn(2, 3, 8, 8))
    >>> [trial.step for trial in fast.trials]
    ['batch norm folded', 'channels last']
    """
    if precision not in PRECISIONS:
        hint = did_you_mean(str(precision), PRECISIONS)
        raise InputError(f"unknown precision {precision!r}{hint} (known: {', '.join(PRECISIONS)})")
    network, output = (model.module, model.output) if isinstance(model, Classifier) else (model, None)

    def maps(prepared: Any) -> list[npt.NDArray[Any]]:
        values = explain(prepared, example, rule=rule, output=output).values
        return [as_numpy(tensor) for _, tensor in tensors_with_paths(values)]

    return prepared_for(network, example, maps, precision)


def prepared_for(
    model: Any, example: Any, maps: Callable[[Any], list[npt.NDArray[Any]]], precision: str = "float32"
) -> Prepared:
    """Prepare a network for what `maps` computes with it."""
    framework = capability(framework_of_model(model), "prepare")
    reference = maps(model)
    best, steps, trials = framework.prepared(model, (), example), tuple[str, ...](), []
    for step in framework.STEPS:
        if step == HALF and precision == "float32":
            continue
        try:
            candidate = framework.prepared(model, (*steps, step), example)
            trial = _tried(step, candidate, best, maps, reference, step == HALF and precision == HALF)
        except Exception as error:  # whatever a step does to a network that nobody knows, the plain one remains
            trial = Trial(step, False, one_line(error))
            if not isinstance(error, UndertowError | RuntimeError | TypeError | ValueError | AttributeError):
                raise
        trials.append(trial)
        if trial.taken:
            best, steps = candidate, (*steps, step)
    return Prepared(best, steps, tuple(trials))


def _tried(
    step: str,
    candidate: Any,
    best: Any,
    maps: Callable[[Any], list[npt.NDArray[Any]]],
    reference: Sequence[npt.NDArray[Any]],
    asked_for: bool,
) -> Trial:
    """Compare a candidate with the best so far: do the maps agree, and is it quicker?"""
    before = _seconds(lambda: maps(best))
    started = time.perf_counter()
    values = maps(candidate)
    first = time.perf_counter() - started
    difference = _difference(values, reference)
    limit = LIMITS.get(step, LIMITS["float32"])
    if not difference <= limit:
        return Trial(step, False, f"its maps differ by {difference:.2g}, more than {limit:g}", None, None, difference)
    if asked_for:
        return Trial(step, True, f"asked for; its maps differ by {difference:.2g}", first, before, difference)
    # the first call of a layout may prepare kernels: it counts only where it is out of the question
    now = first if first > 3 * HOPELESS * before else _seconds(lambda: maps(candidate))
    if now <= HOPELESS * before:
        for _ in range(ROUNDS - 1):  # in turns, so that a busy moment strikes both
            before = min(before, _seconds(lambda: maps(best)))
            now = min(now, _seconds(lambda: maps(candidate)))
    reason = f"{now / before:.2f} of the time before; its maps differ by {difference:.2g}"
    return Trial(step, now < GAIN * before, reason, now, before, difference)


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _difference(values: Sequence[npt.NDArray[Any]], reference: Sequence[npt.NDArray[Any]]) -> float:
    """Return ‖difference‖ / ‖map‖ of the sample that differs most; infinity where the shapes do.

    >>> _difference([np.array([[3.0, 4.0]])], [np.array([[3.0, 3.5]])]) < 0.11
    True
    """
    if [v.shape for v in values] != [r.shape for r in reference]:
        return float("inf")
    worst = 0.0
    for value, expected in zip(values, reference, strict=True):
        a, b = (array.reshape(len(array), -1).astype(np.float64) for array in (value, expected))
        norms, apart = np.linalg.norm(b, axis=1), np.linalg.norm(a - b, axis=1)
        ratios = np.divide(apart, norms, out=np.where(apart > 0, np.inf, 0.0), where=norms > 0)
        worst = max(worst, float(ratios.max(initial=0.0)))
    return worst
