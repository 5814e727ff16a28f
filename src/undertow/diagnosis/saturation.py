"""Activations that are flat on both sides, and whose inputs are so large that hardly any gradient passes."""

from collections.abc import Iterator

from .evidence import Evidence, OpChain, Step
from .finding import Finding, called, listed, percent

MIN_SATURATED = 0.75
_SOURCE = (
    "saturated: the derivative is below 1 % of its largest value, as tanh's beyond 3 and the sigmoid's beyond 6; "
    f"reported from {100 * MIN_SATURATED:g} % of the elements on; Glorot and Bengio 2010"
)


def saturated(evidence: Evidence) -> Iterator[Finding]:
    """Find tanh, sigmoid and their like whose inputs are nearly all in the flat parts."""
    found: dict[str, tuple[OpChain, Step, Step]] = {}
    for chain in evidence.chains:
        before = chain.steps[0]
        for step in chain.pointwise:
            if step.saturates and step.saturated >= MIN_SATURATED * before.elements > 0:
                found.setdefault(chain.site, (chain, before, step))
            before = step
    if found:
        yield _finding(evidence, found)
    evidence.refuse_unfollowed()


def _finding(evidence: Evidence, found: dict[str, tuple[OpChain, Step, Step]]) -> Finding:
    shares = {site: step.saturated / before.elements for site, (_, before, step) in found.items()}
    worst = max(shares, key=lambda site: shares[site])
    _, before, step = found[worst]
    predicted, observed = (
        total / step.absolute if step.absolute else 0.0 for total in (step.expected_absolute, before.absolute)
    )
    closed = step.closed == before.elements
    sentence = (
        f"{step} is saturated for {percent(shares[worst])} of the output of {called(worst)}: of the gradient's "
        "magnitude "
        f"it passes {observed:.3g} ({predicted:.3g} predicted), and {percent(before.zero_share)} is exactly zero"
    )
    if len(found) > 1:
        sentence += f"; likewise at {listed(site for site in found if site != worst)}"
    first = evidence.sites[0] in found
    where = "Scale the inputs of the network (mean 0, deviation 1)" if first else "Normalise before it"
    return Finding(
        "saturated",
        "error" if closed else "warning",
        tuple(found),
        sentence + ".",
        {"op": step.op, "predicted": predicted, "observed": observed, "saturated": shares},
        f"{where}, or make the weights of {called(worst)} smaller (Glorot's initialisation, a smaller learning rate).",
        _SOURCE,
    )
