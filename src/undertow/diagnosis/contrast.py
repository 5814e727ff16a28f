"""Differences between two runs and their causes, in sentences: only those that the operations after a site prove."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..runs import Run
from ..runs.quantiles import weighted
from .channels import agreements
from .evidence import Evidence, Kind, OpChain, Step
from .finding import NotRecorded, called, percent
from .routing import split


@dataclass(frozen=True)
class _Side:
    """One run's side of a pair of sites."""

    evidence: Evidence
    chain: OpChain

    @property
    def site(self) -> str:
        """The name of the site."""
        return self.chain.site

    def first(self, kind: Kind) -> Step | None:
        """Return the first step of a kind, None where there is none."""
        return next((step for step in self.chain.steps[1:] if step.kind == kind), None)

    def median(self) -> float:
        """Return the median of |g|, zeros included."""
        values, weights = self.evidence.values[self.site]
        return weighted(np.abs(values), weights, [0.5])[0]


def contrast(runs: Sequence[Run]) -> list[str]:
    """Say how each further run differs from the first one, and why, site by site.

    Sites are paired by name, or by order if the names differ. Runs recorded without `diagnose=True` give no
    sentences, because nothing could be proved.

    >>> contrast([])
    []
    """
    sentences: list[str] = []
    for other in runs[1:]:
        try:
            sentences += [sentence for a, b in _pairs(runs[0], other) for sentence in _differences(a, b)]
        except NotRecorded:
            continue
    return sentences


def _pairs(run: Run, other: Run) -> Iterator[tuple[_Side, _Side]]:
    sides = [[_Side(evidence, chain) for chain in evidence.chains] for evidence in map(Evidence, (run, other))]
    others = {side.site: side for side in sides[1]}
    if set(others) == {side.site for side in sides[0]}:
        yield from ((side, others[side.site]) for side in sides[0])
    else:
        yield from zip(*sides, strict=False)


def _differences(a: _Side, b: _Side) -> Iterator[str]:
    max_pool, average_pool = a.first("max-pool"), b.first("average-pool")
    if max_pool and average_pool and split(a.chain).pooling > split(b.chain).pooling:
        yield _pooled(a, b, "average pooling", "it spreads what max-pooling routes")
    if a.first("average-pool") and b.first("max-pool") and split(b.chain).pooling > split(a.chain).pooling:
        yield _pooled(a, b, "max-pooling", "it routes what average pooling spreads")
    gate, other = a.first("activation"), b.first("activation")
    if gate and other and gate.op != other.op:
        yield from _activated(a, b, gate, other)
    if bool(a.first("norm")) != bool(b.first("norm")):
        yield from _normalised(a, b)


def _pooled(a: _Side, b: _Side, pool: str, reason: str) -> str:
    before, after = a.median(), b.median()
    shares = [percent(split(side.chain).total) for side in (a, b)]
    fewer = split(b.chain).total < split(a.chain).total
    if before == after or (after > before) != fewer:  # the median does not follow the zeros, so report the zeros
        change = f"the zeros at {called(b.site)} from {shares[0]} to {shares[1]}"
        medians = f"medians {before:.3g} and {after:.3g}" if before != after else f"both medians are {before:.3g}"
        return f"{pool} {'lowers' if fewer else 'raises'} {change}: {reason} ({medians})"
    change = f"the median at {called(b.site)} from {before:.3g} to {after:.3g}"
    return f"{pool} {'raises' if fewer else 'lowers'} {change}: {reason} (zeros {shares[0]} against {shares[1]})"


def _activated(a: _Side, b: _Side, gate: Step, other: Step) -> Iterator[str]:
    shares = [split(side.chain).activation for side in (a, b)]
    if gate.closed > 0 and other.closed == 0:
        effect = f"passes a scaled part of what {gate.op} blocks"
    elif gate.closed == 0 and other.closed > 0:
        effect = f"blocks what {gate.op} passes"
    else:
        return
    means = [side.chain.steps[0].mean_magnitude for side in (a, b)]
    yield (
        f"{other.op} after {called(b.site)} {effect}: its zeros {percent(shares[0])} against "
        f"{percent(shares[1])}, mean |g| {means[0]:.3g} against {means[1]:.3g}"
    )


def _normalised(a: _Side, b: _Side) -> Iterator[str]:
    norm = a.first("norm") or b.first("norm")
    shares = [agreements(side.evidence).get(side.site, float("nan")) for side in (a, b)]
    with_norm, without = (shares[0], shares[1]) if a.first("norm") else (shares[1], shares[0])
    if norm and norm.op == "batch_norm" and with_norm < without:
        yield (
            f"batch_norm after {called(b.site)} subtracts the mean from each channel's gradient: |sum g| is "
            f"{percent(with_norm)} of sum |g|, and {percent(without)} without it"
        )
