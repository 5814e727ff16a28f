"""What the optimizer makes of the parameters: left out, never stepped, steps too large or small, clipped, decayed."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .evidence import Evidence, StepKey
from .finding import Finding, NotRecorded, listed, percent

MIN_STEPS = 8
HIGH, INFO_HIGH, LOW = 2.0, 0.1, 1e-6
USUAL = 1e-3
_CLIPPED = 0.999
_DECAYED, _DECAYED_HARD = 1.0, 10.0
_RECORD = 'record parameters: sites="params", optimizer=optimizer, measures="norm"'
_DECOUPLED = ("AdamW", "RAdamW", "Lion", "Muon")
_SOURCE_RATE = (
    f"median over weights of ||update|| / ||weight||: about {USUAL:g} is usual (Bottou, Neural networks: tricks of the "
    f"trade, 2012; You et al., arXiv 1708.03888); reported where a step exceeds {HIGH:g} ({INFO_HIGH:g} for "
    f"information), or the later half of the steps stays below {LOW:g}"
)


def optimizer(evidence: Evidence) -> Iterator[Finding]:
    """Find parameters that no optimizer holds, and optimizers that never made a step."""
    parameters = _parameters(evidence)
    trainable = {name: facts for name, facts in parameters.items() if facts["trainable"]}
    left_out = tuple(name for name, facts in trainable.items() if facts["optimizer"] is None)
    if left_out:
        yield Finding(
            "not-in-optimizer",
            "error" if len(left_out) == len(trainable) else "warning",
            left_out,
            f"{listed(left_out)}: trainable, but in none of the optimizers that were given, so nothing changes there "
            f"({len(left_out)} of {len(trainable)} trainable parameters among the "
            "sites).",
            {"predicted": 0, "observed": len(left_out)},
            "Give them to the optimizer (model.parameters(), or add_param_group), also those of layers made or "
            "replaced after it was; or set requires_grad=False if they are not to learn.",
            "the parameter groups of the optimizers when the recording began",
        )
    yield from _never_stepped(evidence, trainable)


def _never_stepped(evidence: Evidence, trainable: Mapping[str, Any]) -> Iterator[Finding]:
    n_batches = len(evidence.rows("batches"))
    stepped = {row["optimizer"] for row in evidence.rows("steps")}
    idle = tuple(n for n, facts in trainable.items() if facts["optimizer"] not in (None, *stepped))
    if not idle or n_batches < 2:
        return
    numbers = sorted({trainable[name]["optimizer"] for name in idle})
    which = f"Optimizer {', '.join(map(str, numbers))}" if stepped else "The optimizer"
    yield Finding(
        "no-step",
        "warning" if stepped else "error",
        idle,
        f"{which} made no step in {n_batches} recorded batches or behind them: {listed(idle)} stay as they are.",
        {"predicted": n_batches, "observed": 0, "optimizers": numbers},
        "Call optimizer.step() behind .backward(); with a GradScaler, scaler.step(optimizer), which leaves a step "
        "out where a gradient is not finite.",
        "the step hooks of the optimizers",
    )


def learning_rate(evidence: Evidence) -> Iterator[Finding]:
    """Find steps that change the weights by far more, or far less, than is usual."""
    ratios = _ratios(evidence)
    typical = {key: float(np.median(list(of_step.values()))) for key, of_step in ratios.items()}
    if len(typical) < MIN_STEPS:
        raise NotRecorded(f"needs {MIN_STEPS} steps of weights with two axes or more")
    order = sorted(typical)
    largest = max(order, key=lambda key: typical[key] if math.isfinite(typical[key]) else 0.0)
    late = float(np.median([typical[key] for key in order[len(order) // 2 :]]))  # a warm-up is over by then
    if typical[largest] > INFO_HIGH:
        yield _rate(evidence, "warning" if typical[largest] > HIGH else "info", typical[largest], ratios[largest])
    elif late < LOW:
        yield _rate(evidence, "warning" if late else "error", late, ratios[order[-1]])


def _ratios(evidence: Evidence) -> dict[StepKey, dict[str, float]]:
    """Return ||update|| / ||weight|| for each step and each weight; those that are zero before it are left out."""
    matrices = _matrices(evidence)
    weights, updates = evidence.norms["weight"], evidence.norms["update"]
    ratios: dict[StepKey, dict[str, float]] = defaultdict(dict)
    for name in matrices:
        for key, update in updates.get(name, {}).items():
            if (size := weights.get(name, {}).get(key, 0.0)) > 0:
                ratios[key][name] = update / size
    return ratios


def _rate(evidence: Evidence, severity: str, typical: float, ratios: dict[str, float]) -> Finding:
    rates = sorted({row["lr"] for row in evidence.rows("steps")})
    rate = f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g}"
    if typical > INFO_HIGH:
        remedy = f"Try a learning rate of about {rates[-1] * USUAL / typical:.1g}, or a warm-up."
    elif typical > 0:
        remedy = "Use a larger learning rate; look at the scheduler, and at how small the gradients are."
    else:
        remedy = "Look at the scheduler and at the parameter groups: the learning rate, or every gradient, is 0."
    when = "In the largest step" if typical > INFO_HIGH else "A step changes"
    change = "the typical weight changes" if typical > INFO_HIGH else "the typical weight"
    return Finding(
        "learning-rate",
        severity,
        tuple(ratios),
        f"{when} {change} by {typical:.3g} of its norm (||update|| / ||weight||; about {USUAL:g} is usual), at a "
        f"learning rate of {rate}: {_what_it_means(typical)}; at {listed(ratios)}.",
        {"predicted": USUAL, "observed": typical, "ratios": ratios, "learning_rates": rates},
        remedy,
        _SOURCE_RATE,
    )


def _what_it_means(typical: float) -> str:
    if typical > INFO_HIGH:
        return "the weights are replaced, not adjusted"
    return "nothing changes" if typical == 0 else f"it takes {1 / typical:.2g} such steps to change it by its own size"


def clipping(evidence: Evidence) -> Iterator[Finding]:
    """Find in how many steps the gradient was clipped between the backward pass and the step, and by how much."""
    _parameters(evidence)
    totals = {phase: _totals(evidence.norms[phase]) for phase in ("accumulated", "gradient")}
    steps = [key for key, total in totals["accumulated"].items() if total > 0 and key in totals["gradient"]]
    if len(steps) < MIN_STEPS:
        raise NotRecorded(f"needs {MIN_STEPS} steps")
    factors = np.array([totals["gradient"][key] / totals["accumulated"][key] for key in steps])
    clipped = factors < _CLIPPED
    if not clipped.any():
        return
    share, factor = float(clipped.mean()), float(np.median(factors[clipped]))
    much = share >= 0.9
    yield Finding(
        "clipped",
        "info",
        tuple(evidence.norms["gradient"]),
        f"The gradient was clipped in {percent(share)} of {len(steps)} steps, to {factor:.3g} of its norm in the "
        f"median one{'; so clipping, not the gradient, sets the size of the steps' if much else ''}.",
        {"predicted": 0.0, "observed": share, "factor": factor, "steps": len(steps)},
        "If it learns too slowly, raise max_norm, or look at why gradients are that large (initialisation, the "
        "scale of the loss, a sum over many elements)."
        if much
        else "Nothing is wrong: it is what clipping is for.",
        "||gradient|| of all recorded parameters as the step was given it, over what the backward passes left",
    )


def weight_decay(evidence: Evidence) -> Iterator[Finding]:
    """Find weights that decay outweighs the gradient at."""
    parameters = _parameters(evidence)
    groups = {(r["epoch"], r["batch"], r["optimizer"], r["group"]): r for r in evidence.rows("steps")}
    weights, updates, gradients = (_late(evidence, phase) for phase in ("weight", "update", "gradient"))
    ratios: dict[str, float] = {}
    for name in _matrices(evidence):
        of_steps = []
        for key, weight in weights.get(name, {}).items():
            group = groups.get((*key[:2], parameters[name]["optimizer"], parameters[name]["group"]))
            if group is None or not group["weight_decay"] > 0:
                continue
            decoupled = group["class"] in _DECOUPLED
            pull = group["weight_decay"] * weight * (group["lr"] if decoupled else 1.0)
            other = gradients.get(name, {}).get(key, 0.0)
            if decoupled:  # the update holds both, at random directions to one another
                other = math.sqrt(max(updates.get(name, {}).get(key, 0.0) ** 2 - pull**2, 0.0))
            of_steps.append(pull / other if other > 0 else math.inf)
        if of_steps:
            ratios[name] = float(np.median(of_steps))
    outweighed = {name: ratio for name, ratio in ratios.items() if ratio > _DECAYED}
    if not outweighed:
        return
    worst = max(outweighed, key=lambda name: outweighed[name])
    hard = float(np.median(list(ratios.values()))) > _DECAYED_HARD
    yield Finding(
        "weight-decay",
        "warning" if hard else "info",
        tuple(outweighed),
        f"At {listed(outweighed)} weight decay pulls more than the gradient: {outweighed[worst]:.3g} times as much "
        f"at {worst} (median over steps): the weights shrink, whatever the data say.",
        {"predicted": _DECAYED, "observed": outweighed[worst], "ratios": ratios},
        "Use a smaller weight_decay, none for biases and norms; where training has converged, the two balance.",
        "weight_decay ||weight|| over ||gradient||; of decoupled decay, lr weight_decay ||weight|| over the rest of "
        "||update|| (Loshchilov and Hutter, arXiv 1711.05101)",
    )


def _parameters(evidence: Evidence) -> dict[str, Any]:
    """Return what the manifest says of the recorded parameters.

    Raises:
        NotRecorded: none were recorded with their optimizer.
    """
    parameters: dict[str, Any] = evidence.run.manifest.get("parameters") or {}
    if not parameters or "steps" not in evidence.run.manifest["tables"]:
        if evidence.framework == "keras":
            raise NotRecorded("parameters of Keras on TensorFlow cannot be recorded yet")
        raise NotRecorded(_RECORD)
    return parameters


def _matrices(evidence: Evidence) -> list[str]:
    """Return the parameters with two axes or more: gains and biases begin at 0 or 1, which says nothing of a step."""
    return [name for name, facts in _parameters(evidence).items() if len(facts["shape"]) > 1]


def _late(evidence: Evidence, phase: str) -> dict[str, dict[StepKey, float]]:
    """Return the norms of the later half of the steps, so that a warm-up is over.

    Raises:
        NotRecorded: there are too few steps.
    """
    norms = evidence.norms[phase]
    steps = sorted({key for of_site in norms.values() for key in of_site})
    if len(steps) < MIN_STEPS:
        raise NotRecorded(f"needs {MIN_STEPS} steps")
    late = set(steps[len(steps) // 2 :])
    return {site: {key: norm for key, norm in of_site.items() if key in late} for site, of_site in norms.items()}


def _totals(norms: Mapping[str, Mapping[StepKey, float]]) -> dict[StepKey, float]:
    """Return the norm over all parameters, for each step."""
    squares: dict[StepKey, float] = defaultdict(float)
    for of_site in norms.values():
        for key, norm in of_site.items():
            squares[key] += norm * norm
    return {key: math.sqrt(total) for key, total in squares.items()}
