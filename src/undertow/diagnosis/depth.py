"""Gradients that shrink or grow with depth: a line fitted to log magnitudes, its interval, and its largest step."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from .evidence import Evidence, OpChain, SiteOutput, Step
from .finding import Finding, NotLookedAt, NotRecorded, called, listed

MIN_SITES = 4
MIN_FACTOR = 1000.0
MIN_INTERVAL_FACTOR = 100.0
INFO_FACTOR = 5.0
_LEAST_SLOPE = 0.5
_KEEPS = 0.9
_WEIGHTED = (["linear"], ["conv1d"], ["conv2d"], ["conv3d"])
_SOURCE = (
    f"least squares fit of log2 |g| on depth: over the whole depth a factor of at least {MIN_FACTOR:g} by the fit and "
    f"{MIN_INTERVAL_FACTOR:g} at the nearer end of its 95 % interval, or {INFO_FACTOR:g} and more than 1 for "
    "information; Glorot and Bengio 2010; He et al., arXiv 1502.01852; Pascanu et al., arXiv 1211.5063"
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


@dataclass(frozen=True)
class Level:
    """The largest gradient among the site outputs that are equally far from the loss.

    Attributes:
        site: where it is.
        call: of the site; None where only the order of the sites is known.
        size: its root mean square, or the site's size where no batch was watched.
    """

    site: str
    call: int | None
    size: float


def levels(outputs: Sequence[SiteOutput]) -> dict[int, int]:
    """Return how many other outputs lie on the longest way from the loss to each output, by its number.

    >>> first, second = SiteOutput("a", 0, 0, (1, 2), 1.0), SiteOutput("b", 0, 1, (2,), 1.0)
    >>> levels([first, second, SiteOutput("c", 0, 2, (-1,), 1.0)])
    {2: 0, 1: 1, 0: 2}
    """
    level: dict[int, int] = {}
    for output in sorted(outputs, key=lambda output: -output.number):
        level[output.number] = 1 + max((level[reader] for reader in output.read_by if reader in level), default=-1)
    return level


def by_depth(evidence: Evidence) -> list[Level]:
    """Return the largest gradient at each depth, the deepest first.

    Depth is counted along the autograd graph, so branches lie beside one another and the calls of a recurrent cell
    behind one another. Without a watched batch, the sites' order of execution stands for it.
    """
    if not evidence.graphs:
        return [Level(site, None, size) for site, size in evidence.sizes.items()]
    found: dict[int, list[Level]] = defaultdict(list)
    for outputs in evidence.graphs:
        level = levels(outputs)
        largest: dict[int, Level] = {}
        for output in outputs:
            at, before = level[output.number], largest.get(level[output.number])
            if output.rms > 0 and math.isfinite(output.rms) and (before is None or output.rms > before.size):
                largest[at] = Level(output.site, output.call, output.rms)
        for at, one in largest.items():
            found[at].append(one)
    return [_typical(found[at]) for at in sorted(found, reverse=True)]


def _typical(of_batches: Sequence[Level]) -> Level:
    """Return one level for those of several batches: the geometric mean of their sizes, under the last one's name."""
    mean = math.exp(sum(math.log(level.size) for level in of_batches) / len(of_batches))
    return Level(of_batches[-1].site, of_batches[-1].call, mean)


def depth(evidence: Evidence) -> Iterator[Finding]:
    """Find gradients that vanish or explode from the loss towards the input.

    Where several outputs are equally deep, the largest gradient counts: a branch with a small one starves nothing
    behind the residual stream. So gradients vanish where all that is as deep or deeper has a small one.
    """
    calls = {} if evidence.graphs else evidence.calls
    if not evidence.graphs and len(evidence.sites) < MIN_SITES:
        raise NotRecorded(f"{f'{evidence.watch}, or ' if calls else ''}record {MIN_SITES} sites or more")
    depths = by_depth(evidence)
    if evidence.graphs and max(max(levels(outputs).values(), default=0) for outputs in evidence.graphs) < MIN_SITES - 1:
        raise NotRecorded(f"needs {MIN_SITES} sites or calls behind one another; record more of them")
    if len(depths) >= MIN_SITES:
        yield from _changes(evidence, depths)
    if calls:
        raise NotLookedAt(f"not through the calls of {listed(calls)}: {evidence.watch}")


def _changes(evidence: Evidence, depths: Sequence[Level]) -> Iterator[Finding]:
    """Yield what a line through the sizes at all depths says."""
    y = np.log2([level.size for level in depths])
    for cause, sign in (("vanishing", 1), ("exploding", -1)):
        course = np.maximum.accumulate(y) if sign > 0 else np.maximum.accumulate(y[::-1])[::-1]
        line, layers = fit(course), len(y) - 1
        factor, nearest = sign * line.slope * layers, min(sign * line.low, sign * line.high) * layers
        middle, breaks = sign * _middle(course), _breaks(sign, course)
        of_depth = breaks or middle >= math.log2(MIN_FACTOR) / 2
        if factor >= math.log2(MIN_FACTOR) and nearest >= math.log2(MIN_INTERVAL_FACTOR) and of_depth:
            yield _finding(evidence, cause, "warning", depths, course, line)
        elif (
            factor >= math.log2(INFO_FACTOR)
            and nearest > 0
            and len(y) > MIN_SITES
            and not breaks
            and middle >= math.log2(INFO_FACTOR) / 2
        ):
            yield _finding(evidence, cause, "info", depths, course, line)


def _middle(y: npt.NDArray[np.float64]) -> float:
    """Return by how much the values between the quarters would change over the whole.

    The scores and what pools before them, and the branches that are deepest, have sizes of their own.
    """
    ends = (len(y) - 1) * np.array([0.25, 0.75])
    low, high = np.interp(ends, np.arange(len(y)), y)
    return 2.0 * float(high - low)


def _finding(
    evidence: Evidence, cause: str, severity: str, depths: Sequence[Level], y: npt.NDArray[np.float64], line: Line
) -> Finding:
    sign = 1 if cause == "vanishing" else -1
    names = _names(depths)
    worst, breaks = int(np.argmax(sign * np.diff(y))), _breaks(sign, y)
    recurrent = _recurrent(depths)
    figures: dict[str, Any] = {
        "factor_per_layer": 2.0**-line.slope,
        "interval": [2.0**-line.high, 2.0**-line.low],
        "sizes": dict(zip(names, (2.0**y).tolist(), strict=True)),
        "breaks_between": [depths[worst].site, depths[worst + 1].site] if breaks else None,
        "recurrent": recurrent,
        "observed": _geometric(np.exp2(-np.diff(y))),
        "predicted": _expected(evidence, depths),
    }
    word = "shrinks" if cause == "vanishing" else "grows"
    unit = "call" if recurrent else "layer"
    sentence = (
        f"From {names[-1]} down to {names[0]} the gradient {word}: by a factor of "
        f"{2.0**-line.slope:.3g} a {unit} (95 % interval {2.0**-line.high:.3g} to {2.0**-line.low:.3g}), from "
        f"{2.0 ** y[-1]:.3g} to {2.0 ** y[0]:.3g}"
    )
    if breaks:
        sentence += (
            f"; most of it between {names[worst + 1]} and {names[worst]}, by a factor of "
            f"{2.0 ** (y[worst] - y[worst + 1]):.3g}"
        )
    if figures["predicted"] is not None:
        sentence += f"; the weights and slopes on the way predict {figures['predicted']:.3g} a {unit}"
    why, remedy = _reason(evidence, cause, figures)
    sites = tuple(dict.fromkeys(level.site for level in depths))
    if severity == "info":
        remedy = f"No cause for alarm below a factor of {MIN_FACTOR:g}. If the early layers learn slowly: {remedy}"
    return Finding(cause, severity, sites, f"{sentence}. {why}", figures, remedy, _SOURCE)


def _breaks(sign: int, y: npt.NDArray[np.float64]) -> bool:
    """Whether one step makes more than half of the change."""
    steps = sign * np.diff(y)
    return bool(len(steps) > 1 and steps.max() > 0.5 * steps[steps > 0].sum())


def _names(depths: Sequence[Level]) -> list[str]:
    """Return what to call each level: the site, with the number of the call where it has several of them."""
    calls = Counter(level.site for level in depths)
    return [
        called(level.site) + (f" (call {level.call})" if calls[level.site] > 1 and level.call is not None else "")
        for level in depths
    ]


def _recurrent(depths: Sequence[Level]) -> str | None:
    """Return the site whose calls make up most of the depth, if there is one."""
    (site, count), *_ = Counter(level.site for level in depths).most_common(1)
    return site if count > len(depths) / 2 else None


def _geometric(factors: npt.NDArray[np.float64]) -> float:
    return float(np.exp2(np.log2(factors).mean()))


def _expected(evidence: Evidence, depths: Sequence[Level]) -> float | None:
    """Return the factor per layer that weights and slopes predict for gradients of random signs, as a geometric mean.

    A site's gradient is that of the next site times the next layer's ||W|| / sqrt(inputs), times the slope in between.
    """
    try:
        chains = {(chain.site, chain.call): chain for chain in evidence.chains if not chain.inside}
        inside = {(chain.site, chain.call): chain for chain in evidence.chains if chain.inside}
    except NotRecorded:
        return None
    names = {output.number: (output.site, output.call) for output in evidence.graphs[-1]}
    readers = {(o.site, o.call): [names.get(reader) for reader in o.read_by] for o in evidence.graphs[-1]}
    factors = []
    for before, after in pairwise((level.site, level.call or 0) for level in depths):
        if readers.get(before) != [after] or before not in chains or after not in chains:
            return None
        own = [step.rms_slope for step in inside[after].steps[1:2]] if after in inside else []
        factors.append(_factor(chains[before], chains[after]) * math.prod(own))
    return _geometric(np.array(factors)) if all(math.isfinite(f) and f > 0 for f in factors) else None


def _factor(before: OpChain, after: OpChain) -> float:
    """Return the factor from a site's gradient to that of the site before; NaN if not only activations lie between."""
    between = before.steps[1:]
    if any(step.kind != "activation" for step in between) or before.steps[-1].readers not in _WEIGHTED:
        return float("nan")
    return after.gain * math.prod(step.rms_slope for step in between)


def _reason(evidence: Evidence, cause: str, figures: dict[str, Any]) -> tuple[str, str]:
    """Return a sentence with the likely reason, and a remedy."""
    try:
        chains = evidence.chains
    except NotRecorded:
        return f"To see why, {evidence.watch}.", "Try residual connections, normalisation, or He initialisation."
    if figures["recurrent"] is not None:
        return _through_time(cause, figures["recurrent"])
    joins = max((chain.joins for chain in chains), default=0)
    gates = [step for chain in chains for step in chain.pointwise if step.kind == "activation"]
    weighted = {chain.site: chain for chain in chains if math.isfinite(chain.gain)}
    slope = float(np.median([step.rms_slope for step in gates])) if gates else 1.0
    gain = float(np.median([chain.gain for chain in weighted.values()])) if weighted else 1.0
    figures |= {"residual_joins": joins, "median_slope": slope, "median_gain": gain}
    residual = (
        "There is no residual path around them." if not joins else f"There are {joins} residual additions on the way."
    )
    if cause == "vanishing" and slope < min(gain, _LEAST_SLOPE):
        return (f"{_slopes(gates, slope)} {residual}", _remedy_of_slopes(gates))
    at = figures["breaks_between"][1] if figures["breaks_between"] else None
    kept = gain * slope > _KEEPS if cause == "vanishing" else gain * slope < 1 / _KEEPS
    if at in weighted and (weighted[at].gain < gain * _KEEPS) == (cause == "vanishing"):
        reason = f"The weights of {called(at)} multiply a gradient by {weighted[at].gain:.3g}, others by {gain:.3g}."
        return (
            f"{reason} {residual}",
            f"Initialise {called(at)} as the others are, or look for what scaled its weights.",
        )
    if kept:
        reason = f"Weights ({gain:.3g}) and slopes ({slope:.3g}) would keep it: something else on the way scales it."
        return f"{reason} {residual}", "Look for factors, means and poolings between these sites, and normalise there."
    reason = (
        f"The weights multiply a gradient by {gain:.3g} a layer (||W|| / sqrt(inputs)), where {1 / slope:.3g} would "
        "keep "
        ""
        f"its size{f' behind {gates[0].op}' if gates else ''}. "
        f"{_initialisation(list(weighted.values()), gates, figures)}"
    )
    return (
        f"{reason} {residual}",
        "Initialise so that the gradient keeps its size (He for ReLU), normalise, or add residual connections.",
    )


def _initialisation(chains: Sequence[OpChain], gates: Sequence[Step], figures: dict[str, Any]) -> str:
    """Say which standard deviation the weights have, and which one would keep a gradient's size."""
    relu = bool(gates) and all("relu" in step.op for step in gates)
    wanted, whose = (math.sqrt(2), "He's") if relu else (1.0, "Glorot's")
    std = float(np.median([chain.weight_std for chain in chains]))
    keeps = float(np.median([chain.weight_std * wanted / chain.gain for chain in chains if chain.gain] or [math.nan]))
    figures |= {"weight_std": std, "keeping_std": keeps}
    return f"That is their initialisation: their standard deviation is {std:.3g}, {whose} would be {keeps:.3g}."


def _slopes(gates: Sequence[Step], slope: float) -> str:
    ops = dict.fromkeys(step.op + (", at most 0.25" if step.op == "sigmoid" else "") for step in gates)
    return f"Each activation multiplies it by {slope:.3g} ({', '.join(ops)}; root mean square of its slope)."


def _remedy_of_slopes(gates: Sequence[Step]) -> str:
    if all("relu" in step.op for step in gates):
        return "Most units are closed: try batch norm before the activation, a smaller learning rate, or a leaky ReLU."
    return "Try ReLU in place of saturating activations, normalisation, or residual connections."


def _through_time(cause: str, site: str) -> tuple[str, str]:
    """Say what a gradient goes through in a recurrent network."""
    again = f"Each call of {called(site)} multiplies the gradient by the same recurrent weights and slopes."
    if cause == "vanishing":
        return again, (
            "Use a gated cell (LSTM, GRU) with an open forget gate (its bias at 1), orthogonal recurrent weights, or "
            "shorter sequences."
        )
    return again, "Clip the norm of the gradient, or use smaller (orthogonal) recurrent weights, or a gated cell."
