"""Channels whose gradient has the same sign at all samples and positions; batch norm would subtract its mean."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..runs.quantiles import weighted
from .evidence import Evidence
from .finding import Finding, NotRecorded, called, listed, percent

MIN_AGREEMENT = 0.5
_MIN_COLUMN_SHARE = 0.5
_SOURCE = (
    "|sum g| / sum |g| over batch and space for each channel of an output: 0 at the input of batch norm, 1 if all "
    f"elements have the same sign; reported from {MIN_AGREEMENT:g} at half of the channels. Bjorck et al., arXiv "
    "1806.02375, compare the two sums for gradients of kernels, in a ResNet of 110 layers at initialisation: without "
    "batch norm they are alike, with it they are not. What they claim is that batch norm allows larger learning rates, "
    "at which activations would else grow with depth and the loss diverge; not that a network without it fails"
)


def batch_norm(evidence: Evidence) -> Iterator[Finding]:
    """Find sites without normalisation where the mean over batch and space dominates the gradient of a channel."""
    shares = agreements(evidence)
    if not shares:
        seen = evidence.watched or "channel_sums" in evidence.run.manifest["tables"]
        raise NotRecorded(
            "no gradient came but zeros and NaN" if seen else f"{evidence.watch}, or record the measure channel-sums"
        )
    normalised = {chain.site for chain in evidence.chains if chain.normalised} if evidence.watched else set()
    unnormalised = set(shares) - normalised - {evidence.sites[-1]}  # the scores are not meant to be normalised
    high = {site: value for site, value in shares.items() if site in unnormalised and value >= MIN_AGREEMENT}
    if len(high) < 2 or len(high) < len(unnormalised) / 2:
        return
    worst = max(high, key=lambda site: high[site])
    figures: dict[str, Any] = {"predicted": 0.0, "observed": high[worst], "agreement": shares}
    sentence = (
        f"At {listed(high)} most of a channel's gradient has the same sign over samples and positions: |sum g| is "
        f"up to {percent(high[worst])} of sum |g| ({called(worst)}), so updates hardly depend on the input; batch norm "
        "would make it 0"
    )
    if tail := _tail(evidence, worst):
        figures["tail"] = tail
        sentence += f"; its 99.9 % quantile of |g| is {tail:.3g} times its median"
    if column := _column(evidence):
        figures |= column
        sentence += f"; output {column['column']} alone carries {percent(column['column_share'])} of the last gradient"
    yield Finding(
        "no-batch-norm",
        "info",
        tuple(high),
        sentence + ".",
        figures,
        "Nothing need be wrong: it is so in many networks that learn well. Where a deep convolutional network "
        "learns only at small learning rates, batch norm after these layers may allow larger ones; centring inputs and "
        "outputs helps too.",
        _SOURCE,
    )


def agreements(evidence: Evidence) -> dict[str, float]:
    """Return for each site the median over channels and batches of |sum g| / sum |g|."""
    shares: dict[str, list[float]] = {}
    rows = [row for row in evidence.rows("channel_sums") if row["phase"] == "backward"]
    for row in rows or [row for rows in evidence.outputs.values() for row in rows]:
        sums, absolutes = np.abs(row["sums"]), np.asarray(row["absolutes"], np.float64)
        nonzero = (absolutes > 0) & np.isfinite(absolutes)
        if nonzero.any():
            shares.setdefault(row["site"], []).append(_median(sums[nonzero] / absolutes[nonzero]))
    return {site: float(np.median(shares[site])) for site in evidence.sites if site in shares}


def _median(values: npt.NDArray[np.float64]) -> float:
    """Return the median; `np.median` takes five times as long for short arrays."""
    ordered, n = np.sort(values), len(values)
    return float(ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def _tail(evidence: Evidence, site: str) -> float | None:
    """Return the 99.9 % quantile of nonzero |g| divided by their median, None without histograms."""
    if site not in evidence.values:
        return None
    values, weights = evidence.values[site]
    nonzero = values != 0
    median, high = weighted(np.abs(values[nonzero]), weights[nonzero], (0.5, 0.999))
    return high / median if np.isfinite(median) else None


def _column(evidence: Evidence) -> dict[str, Any] | None:
    """Return the output of the last site that carries at least half of sum |g|, if there are at least 5 outputs."""
    rows = evidence.outputs.get(evidence.sites[-1], [])
    if not rows or len(rows[-1]["shape"]) != 2 or len(rows[-1]["absolutes"]) < 5:
        return None
    magnitudes = np.sum([row["absolutes"] for row in rows if np.isfinite(row["absolutes"]).all()], axis=0)
    if not np.any(magnitudes):
        return None
    column = int(np.argmax(magnitudes))
    share = float(magnitudes[column] / magnitudes.sum())
    return {"column": column, "column_share": share} if share >= _MIN_COLUMN_SHARE else None
