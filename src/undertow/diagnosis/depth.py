"""Gradients that shrink or grow with depth: a line fitted to log magnitudes, its interval, and its largest step."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from .evidence import WATCH, Evidence, OpChain
from .finding import Finding, NotRecorded, called

MIN_SITES = 4
MIN_FACTOR = 1000.0
MIN_INTERVAL_FACTOR = 100.0
_SOURCE = (
    f"least squares fit of log2 |g| on depth: over the whole depth a factor of at least {MIN_FACTOR:g} by the fit and "
    f"{MIN_INTERVAL_FACTOR:g} at the nearer end of its 95 % interval; Glorot and Bengio 2010; He et al., arXiv "
    "1502.01852"
)


@dataclass(frozen=True)
class Line:
    """A straight line through points, and the 95 % interval of its slope."""

    slope: float
    low: float
    high: float


def t_quantile(p: float, degrees: int) -> float:
    """Return a quantile of Student's t distribution, within 1 % for 3 or more degrees of freedom.

    Source: Abramowitz and Stegun 26.7.5.

    >>> round(t_quantile(0.975, 10), 2)
    2.23
    """
    z, n = NormalDist().inv_cdf(p), degrees
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(n) ** power for power, term in enumerate(terms, 1))


def fit(y: npt.NDArray[np.float64]) -> Line:
    """Fit a line to at least four values at 0, 1, 2, ....

    >>> fit(np.array([0.0, 2.0, 4.0, 6.0]))
    Line(slope=2.0, low=2.0, high=2.0)
    """
    x = np.arange(len(y)) - (len(y) - 1) / 2
    spread = float((x**2).sum())
    slope = float((x * y).sum()) / spread
    residuals = y - y.mean() - slope * x
    degrees = max(len(y) - 2, 1)
    half = t_quantile(0.975, degrees) * math.sqrt(float((residuals**2).sum()) / degrees / spread)
    return Line(slope, slope - half, slope + half)


def depth(evidence: Evidence) -> Iterator[Finding]:
    """Find gradients that vanish or explode from the loss towards the input."""
    sizes = evidence.sizes
    if len(evidence.sites) < MIN_SITES:
        raise NotRecorded(f"record {MIN_SITES} sites or more")
    if len(sizes) < MIN_SITES:
        return
    sites, y = list(sizes), np.log2(list(sizes.values()))
    line = fit(y)
    layers = len(y) - 1
    for cause, sign in (("vanishing", 1), ("exploding", -1)):
        nearest = min(sign * line.low, sign * line.high)
        if sign * line.slope * layers >= math.log2(MIN_FACTOR) and nearest * layers >= math.log2(MIN_INTERVAL_FACTOR):
            yield _finding(evidence, cause, sign, sites, y, line)


def _finding(
    evidence: Evidence, cause: str, sign: int, sites: list[str], y: npt.NDArray[np.float64], line: Line
) -> Finding:
    steps = sign * np.diff(y)
    worst = int(np.argmax(steps))
    breaks = len(steps) > 1 and steps[worst] > 0.5 * steps[steps > 0].sum()
    figures: dict[str, Any] = {
        "factor_per_layer": 2.0**-line.slope,
        "interval": [2.0**-line.high, 2.0**-line.low],
        "sizes": dict(zip(sites, (2.0**y).tolist(), strict=True)),
        "breaks_between": [sites[worst], sites[worst + 1]] if breaks else None,
        "observed": _geometric(np.exp2(-np.diff(y))),
        "predicted": _expected(evidence, sites),
    }
    word = "shrinks" if cause == "vanishing" else "grows"
    sentence = (
        f"From {called(sites[-1])} down to {called(sites[0])} the gradient {word}: by a factor of "
        f"{2.0**-line.slope:.3g} a layer (95 % interval {2.0**-line.high:.3g} to {2.0**-line.low:.3g}), from "
        f"{2.0 ** y[-1]:.3g} to {2.0 ** y[0]:.3g}"
    )
    if breaks:
        between = f"{called(sites[worst + 1])} and {called(sites[worst])}"
        sentence += f"; most of it between {between}, by a factor of {2.0 ** (y[worst] - y[worst + 1]):.3g}"
    if figures["predicted"] is not None:
        sentence += f"; the weights and slopes on the way predict {figures['predicted']:.3g} a layer"
    why, remedy = _reason(evidence, cause, figures)
    return Finding(cause, "warning", tuple(sites), f"{sentence}. {why}", figures, remedy, _SOURCE)


def _geometric(factors: npt.NDArray[np.float64]) -> float:
    return float(np.exp2(np.log2(factors).mean()))


def _expected(evidence: Evidence, sites: list[str]) -> float | None:
    """Return the factor per layer that weights and slopes predict for gradients of random signs, as a geometric mean.

    A site's gradient is that of the next site times the next layer's ||W|| / sqrt(inputs), times the slope in between.
    """
    try:
        chains = {chain.site: chain for chain in evidence.chains}
    except NotRecorded:
        return None
    pairs = [(chains.get(a), chains.get(b)) for a, b in pairwise(sites)]
    factors = [_factor(a, b) for a, b in pairs if a is not None and b is not None]
    usable = np.array([factor for factor in factors if math.isfinite(factor) and factor > 0])
    return _geometric(usable) if len(usable) == len(sites) - 1 else None


def _factor(before: OpChain, after: OpChain) -> float:
    """Return the factor from a site's gradient to that of the site before; NaN if not only activations lie between."""
    between = before.steps[1:]
    if any(step.kind != "activation" for step in between) or not before.single_reader:
        return float("nan")
    return after.gain * math.prod(step.slope for step in between)


def _reason(evidence: Evidence, cause: str, figures: dict[str, Any]) -> tuple[str, str]:
    """Return a sentence with the likely reason, and a remedy."""
    try:
        chains = evidence.chains
    except NotRecorded:
        return f"To see why, {WATCH}.", "Try residual connections, normalisation, or He initialisation."
    joins = max((chain.joins for chain in chains), default=0)
    gates = [step for chain in chains for step in chain.pointwise if step.kind == "activation"]
    gains = {chain.site: chain.gain for chain in chains if math.isfinite(chain.gain)}
    slope = float(np.median([step.slope for step in gates])) if gates else 1.0
    gain = float(np.median(list(gains.values()))) if gains else 1.0
    figures |= {"residual_joins": joins, "median_slope": slope, "median_gain": gain}
    residual = (
        "There is no residual path around them." if not joins else f"There are {joins} residual additions on the way."
    )
    if cause == "vanishing" and slope < min(gain, 0.5):
        ops = dict.fromkeys(step.op + (", at most 0.25" if step.op == "sigmoid" else "") for step in gates)
        reason = f"Each activation multiplies it by {slope:.3g} ({', '.join(ops)})."
        return (
            f"{reason} {residual}",
            "Try ReLU in place of saturating activations, normalisation, or residual connections.",
        )
    reason = f"The weights multiply a gradient by {gain:.3g} a layer"
    if figures["breaks_between"] and (at := figures["breaks_between"][1]) in gains:
        reason += f", those of {called(at)} by {gains[at]:.3g}"
    reason += " (||W|| / sqrt(inputs); 1 preserves it)."
    return (
        f"{reason} {residual}",
        "Initialise so that this factor is near 1 (He for ReLU), normalise, or add residual connections.",
    )
