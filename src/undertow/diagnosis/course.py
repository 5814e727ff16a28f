"""Changes from batch to batch: jumps, drifts, and gradients that drown in noise."""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from .depth import fit
from .evidence import Evidence
from .finding import Finding, NotRecorded, called, listed

MIN_BATCHES = 8
_DEVIATIONS = 8.0
_FACTOR = 8.0
_DRIFT = 100.0
_NOISE = 0.1
_SIGNAL = 3.0
_BEFORE = 4
_JUMP_SOURCE = (
    f"a batch whose log root mean square lies {_DEVIATIONS:g} median absolute deviations and a factor of {_FACTOR:g} "
    f"from the median of the {_BEFORE} batches before it, and a factor of {_FACTOR:g} from the last of them"
)
_NOISE_SOURCE = (
    f"|mean| / standard deviation over batches of each channel's summed gradient, the gradient of its bias: below "
    f"{_NOISE:g} of the median site's, and below 1; where the median site's is {_SIGNAL:g} standard errors at least"
)


def jump(evidence: Evidence) -> Iterator[Finding]:
    """Find batches with a sudden much larger or smaller gradient, and gradients that drift through the run."""
    series = {site: course for site, course in evidence.course.items() if len(course) >= MIN_BATCHES}
    if not series:
        raise NotRecorded(f"record {MIN_BATCHES} batches or more")
    jumps: dict[str, tuple[int, float]] = {}
    drifts: dict[str, float] = {}
    for site, course in series.items():
        usable = np.isfinite(course) & (course > 0)
        if usable.sum() < MIN_BATCHES:
            continue
        logs = np.log2(course[usable])
        if (jumped := _jump(logs)) is not None:
            jumps[site] = (int(np.flatnonzero(usable)[jumped[0]]), float(2.0 ** jumped[1]))
        elif _drifts(logs):
            drifts[site] = float(2.0 ** (fit(logs).slope * (len(logs) - 1)))
    if jumps:
        yield _jumped(jumps, evidence.n_earlier)
    if drifts:
        yield _drifted(drifts)


def _jump(logs: npt.NDArray[np.float64]) -> tuple[int, float] | None:
    """Return the batch that lies farthest from the batches before it, and how far; None where no one lies far enough.

    Measured from the median of the run, each end of a steady decay would be a jump. A fall counts only where it lasts:
    a batch of which hardly anything is wrong is no event.
    """
    padded = np.append(logs, np.full(_BEFORE - 1, logs[-1]))
    medians = np.sort(sliding_window_view(padded, _BEFORE), axis=1)[:, _BEFORE // 2 - 1 : _BEFORE // 2 + 1].mean(axis=1)
    before, ahead = medians[: len(logs) - _BEFORE], medians[_BEFORE:]
    own, last = logs[_BEFORE:], logs[_BEFORE - 1 : -1]
    distance = own - before
    least = max(_DEVIATIONS * float(np.median(np.abs(distance))), math.log2(_FACTOR))
    far = (np.abs(distance) > least) & (np.abs(own - last) > math.log2(_FACTOR))
    far &= (distance > 0) | (before - ahead > least)
    if not far.any():
        return None
    worst = int(np.argmax(np.where(far, np.abs(distance), 0.0)))
    return worst + _BEFORE, float(distance[worst])


def _drifts(logs: npt.NDArray[np.float64]) -> bool:
    line = fit(logs)
    slope = min(abs(line.low), abs(line.high)) if line.low * line.high > 0 else 0.0
    return slope * (len(logs) - 1) > math.log2(_DRIFT)


def _jumped(jumps: dict[str, tuple[int, float]], n_earlier: int) -> Finding:
    worst = max(jumps, key=lambda site: abs(math.log2(jumps[site][1])))
    batch, factor = jumps[worst]
    return Finding(
        "jump",
        "warning",
        tuple(jumps),
        f"In recorded batch number {n_earlier + batch + 1} the gradient at {called(worst)} is {factor:.3g} times its "
        f"median over the {_BEFORE} batches before; affected: {listed(jumps)}.",
        {
            "predicted": 1.0,
            "observed": factor,
            "batch": n_earlier + batch,
            "jumps": {site: [n_earlier + number, size] for site, (number, size) in jumps.items()},
        },
        "Check the samples of that batch and the learning rate; clip gradients if it happens again.",
        _JUMP_SOURCE,
    )


def _drifted(drifts: dict[str, float]) -> Finding:
    worst = max(drifts, key=lambda site: abs(math.log2(drifts[site])))
    return Finding(
        "jump",
        "info",
        tuple(drifts),
        f"Over the run the gradient at {called(worst)} is multiplied by {drifts[worst]:.3g}; affected: "
        f"{listed(drifts)}.",
        {"kind": "drift", "predicted": 1.0, "observed": drifts[worst], "drifts": drifts},
        "If it grows, use a smaller learning rate or normalisation; if it decays, that is what convergence looks like.",
        f"least squares fit of log2 rms on the batch: over the run a factor of at least {_DRIFT:g} at the nearer end "
        "of its 95 % interval",
    )


def noise(evidence: Evidence) -> Iterator[Finding]:
    """Find sites whose gradient varies from batch to batch, relative to its mean, far more than at the other sites."""
    ratios = {site: ratio for site in evidence.outputs if (ratio := _signal(evidence, site)) is not None}
    if len(ratios) < 3:
        watch = evidence.watch.replace("diagnose=True", "diagnose=1")
        raise NotRecorded(f"needs {MIN_BATCHES} watched batches at 3 sites; {watch}")
    usual = float(np.median(list(ratios.values())))
    n_batches = min(len(evidence.outputs[site]) for site in ratios)
    if usual * math.sqrt(n_batches) < _SIGNAL:  # at the median site, too, the mean is no larger than chance makes it
        return
    noisy = {site: ratio for site, ratio in ratios.items() if ratio < min(_NOISE * usual, 1.0)}
    if noisy:
        worst = min(noisy, key=lambda site: noisy[site])
        yield Finding(
            "noise",
            "warning",
            tuple(noisy),
            f"At {listed(noisy)} the gradient drowns in noise: its mean over batches is {noisy[worst]:.3g} of its "
            f"standard deviation, against {usual:.3g} at the median site (medians over channels).",
            {"predicted": usual, "observed": noisy[worst], "signal_to_noise": ratios},
            "Look for noise that is added there (dropout, perturbed gradients), or use larger batches.",
            _NOISE_SOURCE,
        )


def _signal(evidence: Evidence, site: str) -> float | None:
    """Return the median over channels of |mean| / standard deviation of the summed gradient over watched batches."""
    rows = [row for row in evidence.outputs[site] if row["call"] == 0 and np.isfinite(row["sums"]).all()]
    lengths = {len(row["sums"]) for row in rows}
    if len(rows) < MIN_BATCHES or len(lengths) != 1:
        return None
    sums = np.array([row["sums"] for row in rows])
    deviation = sums.std(axis=0, ddof=1)
    alive = deviation > 0
    return float(np.median(np.abs(sums.mean(axis=0))[alive] / deviation[alive])) if alive.any() else None
