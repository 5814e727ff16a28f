"""Differences between two runs and their causes, in sentences: only those that the operations after a site prove."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..runs import Comparison, Run
from ..runs.quantiles import weighted
from .channels import agreements
from .evidence import Evidence, Kind, OpChain, Step
from .finding import NotRecorded, called, listed, percent
from .routing import split


@dataclass(frozen=True)
class _Side:
    """One run's side of a pair of sites."""

    evidence: Evidence
    chain: OpChain
    run: str

    @property
    def site(self) -> str:
        """The name of the site."""
        return self.chain.site

    @property
    def called(self) -> str:
        """The site and the run, for a sentence."""
        return f"{called(self.site)} of {self.run}"

    def first(self, kind: Kind) -> Step | None:
        """Return the first step of a kind, None where there is none."""
        return next((step for step in self.chain.steps[1:] if step.kind == kind), None)

    def median(self) -> float:
        """Return the median of |g|, zeros included."""
        values, weights = self.evidence.values[self.site]
        return weighted(np.abs(values), weights, [0.5])[0]


def contrast(runs: Sequence[Run]) -> list[str]:
    """Say how each further run differs from the first one, and why, site by site; each names the run that it speaks of.

    Sites are paired by name, or by order if the names differ. Runs recorded without `diagnose=True` give no
    sentences, because nothing could be proved.

    >>> contrast([])
    []
    """
    sentences: list[str] = []
    names = _names(runs)
    for other, name in zip(runs[1:], names[1:], strict=True):
        try:
            pairs = _pairs(runs[0], other, (names[0], name))
            sentences += [sentence for a, b in pairs for sentence in _differences(a, b)]
        except NotRecorded:
            continue
    return sentences


def _names(runs: Sequence[Run]) -> list[str]:
    """Return each run's folder: its last part, or all of it where those are not different."""
    short = [run.folder.name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.folder) for run in runs]


def coincidences(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> list[str]:
    """Say at which sites the quantiles of a further run are those of the first one, to the last bit, and why.

    >>> coincidences([], [])
    []
    """
    sentences = []
    names = _names(runs)
    for i in range(1, len(runs)):
        by_reason: dict[str, list[str]] = {}
        for row in comparisons:
            if row.same[i]:
                by_reason.setdefault(_why_same(runs[0], runs[i], row, i), []).append(row.sites[0] or "")
        for reason, sites in by_reason.items():
            curves = f"the curves of {names[0]} and {names[i]} are one"
            sentences.append(f"{curves} at {listed(dict.fromkeys(sites))}: {reason}")
    return sentences


def _why_same(run: Run, other: Run, row: Comparison, i: int) -> str:
    """Return the likeliest reason why two runs have the same quantiles at a site."""
    model, others = (one.manifest.get("model", {}) for one in (run, other))
    objective = run.manifest.get("objective")
    if run.folder.resolve() == other.folder.resolve():
        return "they are one run"
    if all(s is not None and s.zeros == s.count for s in (row.quantiles[0], row.quantiles[i])):
        return "both are zero throughout"
    if model.get("weights_sha256") == others.get("weights_sha256") and row.phase in ("backward", "forward"):
        return "the networks have the same weights, and what ran was the same"
    if row.sites[0] == run.sites[-1] and row.phase == "backward" and objective in ("predicted", "label"):
        return "the objective is a score, whose gradient at the scores is 1 for its class and 0 for all others"
    return "what follows there gives the same gradient in both, though their weights differ"


def _pairs(run: Run, other: Run, names: tuple[str, str]) -> Iterator[tuple[_Side, _Side]]:
    both = zip(map(Evidence, (run, other)), names, strict=True)
    sides = [[_Side(evidence, chain, name) for chain in evidence.chains] for evidence, name in both]
    others = {(side.site, side.chain.inside): side for side in sides[1]}
    if set(others) == {(side.site, side.chain.inside) for side in sides[0]}:
        yield from ((side, others[side.site, side.chain.inside]) for side in sides[0])
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
        change = f"the zeros at {called(b.site)} from {shares[0]} to {shares[1]} in {b.run}"
        medians = f"medians {before:.3g} and {after:.3g}" if before != after else f"both medians are {before:.3g}"
        return f"{pool} {'lowers' if fewer else 'raises'} {change}: {reason} ({medians})"
    change = f"the median at {called(b.site)} from {before:.3g} to {after:.3g} in {b.run}"
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
        f"{other.op} after {called(b.site)} {effect}: its zeros {percent(shares[0])} in {a.run} against "
        f"{percent(shares[1])} in {b.run}, mean |g| {means[0]:.3g} against {means[1]:.3g}"
    )


def _normalised(a: _Side, b: _Side) -> Iterator[str]:
    has, lacks = (a, b) if a.first("norm") else (b, a)
    norm = has.first("norm")
    with_norm, without = (agreements(side.evidence).get(side.site, float("nan")) for side in (has, lacks))
    if norm and norm.op == "batch_norm" and with_norm < without:
        yield (
            f"batch_norm after {has.called} subtracts the mean from each channel's gradient: |sum g| is "
            f"{percent(with_norm)} of sum |g|, and {percent(without)} at {lacks.called}, which has none"
        )
