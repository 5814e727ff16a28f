"""Units and layers that are inactive on every sample, and the layers before them, which get no gradient."""

from collections.abc import Iterator

import numpy as np

from .evidence import Evidence, OpChain, Step
from .finding import Finding, called, first_of, listed, percent

MIN_ELEMENTS = 100
_WARNING_SHARE = 0.1
_WARNING_SHARE_OF_FEATURES = 2 / 3
_WELL_SEEN = 1000
_MIN_SWITCHING = 0.05
_SOURCE = f"a channel counts as dead if all its elements, at least {MIN_ELEMENTS}, were inactive; cf. arXiv 1903.06733"
_REMEDY = "a smaller learning rate, He initialisation, batch norm before the activation, or a leaky activation"


def dead(evidence: Evidence) -> Iterator[Finding]:
    """Find channels and whole layers whose activation was inactive on every watched sample."""
    all_zero = [site for site, (zeros, total) in evidence.zeros.items() if zeros == total > 0]
    layers = inactive_layers(evidence) if evidence.watched else []
    units = [(chain, step) for chain, step in _activations(evidence) if 0 < _dead(step) < len(step.active)]
    if units:
        yield _units(evidence, units)
    if layers:
        yield _layer(evidence, layers, all_zero)
    elif all_zero and len(all_zero) < len(evidence.zeros):
        multiplied = _behind_zero_weights(evidence)
        if explained := [site for site in all_zero if site in multiplied]:
            yield _zero_weights(explained, multiplied)
        if unexplained := [site for site in all_zero if site not in multiplied and not _saturates(evidence, site)]:
            yield _nothing_passes(evidence, unexplained)
    if evidence.watched:
        evidence.refuse_unfollowed()


def inactive_layers(evidence: Evidence) -> list[tuple[OpChain, Step]]:
    """Return the layers no unit of which was active in any watched batch."""
    return [(chain, step) for chain, step in _activations(evidence) if _dead(step) == len(step.active)]


def _dead(step: Step) -> int:
    return int((step.active == 0).sum())


def _saturates(evidence: Evidence, site: str) -> bool:
    """Whether a saturated activation, which has a finding of its own, lets nothing pass at a site or behind it."""
    if not evidence.watched:
        return False
    closed = {c.site for c in evidence.chains for s in c.pointwise if s.saturates and s.closed == s.elements}
    return any(evidence.position[other] >= evidence.position[site] for other in closed)


def _activations(evidence: Evidence) -> Iterator[tuple[OpChain, Step]]:
    """Yield each activation with enough elements per channel, once."""
    seen: set[tuple[str, str]] = set()
    for chain in evidence.chains if evidence.watched else ():
        for step in chain.steps[1:]:
            elements = chain.steps[0].elements / max(len(step.active), 1)
            if (
                len(step.active)
                and step.closed >= 0
                and not step.saturates
                and elements >= MIN_ELEMENTS
                and (chain.site, step.module) not in seen
            ):
                seen.add((chain.site, step.module))
                yield chain, step


def _units(evidence: Evidence, units: list[tuple[OpChain, Step]]) -> Finding:
    chain, step = max(units, key=lambda unit: _dead(unit[1]) / len(unit[1].active))
    share = _dead(step) / len(step.active)
    many = [unit for unit in units if _are_many(*unit)]
    varied = bool(many) and float(np.median([_switching(*unit) for unit in many])) >= _MIN_SWITCHING
    rest = sorted((u for u in units if u[0] is not chain), key=lambda u: -_dead(u[1]) / len(u[1].active))
    others = {other.site: f"{_dead(its)} of {len(its.active)} at {called(other.site)}" for other, its in rest}
    sentence = (
        f"{_dead(step)} of {len(step.active)} channels of {called(chain.site)} ({percent(share)}) were inactive after "
        f"{step.op} on all {evidence.samples} watched samples: they pass no gradient and their weights do not learn"
    )
    if others:
        sentence += f"; likewise {first_of(list(others.values()))}"
    if many and not varied:
        sentence += "; most other channels never switch either, so these samples may be too alike to tell"
    return Finding(
        "dead-units",
        "warning" if varied else "info",
        tuple(dict.fromkeys(chain.site for chain, _ in units)),
        sentence + ".",
        {
            "channels": {chain.site: np.flatnonzero(step.active == 0).tolist() for chain, step in units},
            "predicted": step.closed / chain.steps[0].elements,
            "observed": chain.steps[0].zero_share,
            "samples": evidence.samples,
        },
        f"If there are many: {_REMEDY}.",
        _SOURCE,
    )


def _are_many(chain: OpChain, step: Step) -> bool:
    """Whether so many are inactive that it matters.

    A feature of a linear layer is seen at one position of each sample only, and a channel of a small plane at few: with
    inputs of one sign or little variety a third of them is inactive in networks that learn well.
    """
    well_seen = len(step.shape) > 2 and chain.steps[0].elements / len(step.active) >= _WELL_SEEN
    return _dead(step) / len(step.active) >= (_WARNING_SHARE if well_seen else _WARNING_SHARE_OF_FEATURES)


def _switching(chain: OpChain, step: Step) -> float:
    """Return how often the median channel that is not dead is in the rarer of its two states, in [0, 0.5]."""
    active = step.active[step.active > 0] * (len(step.active) / chain.steps[0].elements)
    return float(np.median(np.minimum(active, 1 - active)))


def _behind_zero_weights(evidence: Evidence) -> dict[str, list[str]]:
    """Return the sites that get no gradient because their readers multiply by zeros, with the sites that read."""
    if not evidence.watched:
        return {}
    zero = {(chain.site, chain.call) for chain in evidence.chains if chain.zero_operand}
    explained: dict[str, list[str]] = {}
    for outputs in evidence.graphs:
        site_of = {output.number: output.site for output in outputs}
        numbers: set[int] = set()
        for output in reversed(outputs):
            behind = bool(output.read_by) and numbers.issuperset(output.read_by)
            if output.rms == 0 and ((output.site, output.call) in zero or behind):
                numbers.add(output.number)
                readers = [site_of[reader] for reader in output.read_by if reader in site_of]
                explained.setdefault(output.site, readers)
    return explained


def _zero_weights(sites: list[str], readers: dict[str, list[str]]) -> Finding:
    reading = dict.fromkeys(reader for site in sites for reader in readers[site] if reader not in readers)
    by = f" ({listed(reading)})" if reading else ""
    return Finding(
        "zero-weights",
        "info",
        tuple(sites),
        f"The gradient at {listed(sites)} is exactly zero, because what reads it multiplies it by zeros only{by}: "
        "adapters and gates that begin at zero do so in their first step.",
        {"predicted": 1.0, "observed": 1.0, "readers": list(reading)},
        "Nothing is wrong at the start; if it is still so after some steps, the weights that are zero do not learn.",
        "the chain rule: the gradient at the input of a product is the gradient at its output times the other factor",
    )


def _layer(evidence: Evidence, layers: list[tuple[OpChain, Step]], all_zero: list[str]) -> Finding:
    chain, step = layers[-1]  # nearest to the loss: the first that the gradient reaches
    others = [other.site for other, _ in layers[:-1]]
    below = [site for site in all_zero if evidence.position[site] <= evidence.position[chain.site]]
    sentence = (
        f"Every unit of {called(chain.site)} was inactive after {step} on all {evidence.samples} watched samples: "
        f"no gradient passes through it, and the gradient at {listed(below)} is exactly zero."
    )
    if others:
        sentence += f" Also dead: {listed(others)}."
    return Finding(
        "dead-layer",
        "error",
        tuple(dict.fromkeys([*below, chain.site])),
        sentence,
        {
            "dead": [dead_chain.site for dead_chain, _ in layers],
            "starved": below,
            "predicted": 1.0,
            "observed": 1.0 if below else float("nan"),
        },
        f"Start again with {_REMEDY}; a dead layer does not recover by itself.",
        _SOURCE,
    )


def _nothing_passes(evidence: Evidence, all_zero: list[str]) -> Finding:
    """Report the sites whose gradient is all zero if no watched activation explains it."""
    if evidence.watched:
        cause = "no activation after them is inactive throughout, so the zeros come from the function that reads them"
    else:
        cause = f"to see what blocks it, {evidence.watch}"
    return Finding(
        "dead-layer",
        "error",
        tuple(all_zero),
        f"The gradient at {listed(all_zero)} is exactly zero in every batch, but not at other sites; {cause}.",
        {"predicted": None, "observed": 1.0, "starved": all_zero},
        "Look at the operations between the last of these sites and the next one.",
        "all recorded elements are zero",
    )
