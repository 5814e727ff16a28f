"""Units and layers that are inactive on every sample, and the layers before them, which get no gradient."""

from collections.abc import Iterator

from .evidence import WATCH, Evidence, OpChain, Step
from .finding import Finding, called, listed, percent

MIN_ELEMENTS = 100
_WARNING_SHARE = 0.1
_SOURCE = f"a channel counts as dead if all its elements, at least {MIN_ELEMENTS}, were inactive; cf. arXiv 1903.06733"
_REMEDY = "a smaller learning rate, He initialisation, batch norm before the activation, or a leaky activation"


def dead(evidence: Evidence) -> Iterator[Finding]:
    """Find channels and whole layers whose activation was inactive on every watched sample."""
    all_zero = [site for site, (zeros, total) in evidence.zeros.items() if zeros == total > 0]
    layers: list[tuple[OpChain, Step]] = []
    for chain, step in _activations(evidence):
        n_dead = int((step.active == 0).sum())
        if n_dead == len(step.active):
            layers.append((chain, step))
        elif n_dead:
            yield _units(evidence, chain, step, n_dead)
    if layers:
        yield _layer(evidence, layers, all_zero)
    elif all_zero and len(all_zero) < len(evidence.zeros):
        yield _nothing_passes(evidence, all_zero)


def _activations(evidence: Evidence) -> Iterator[tuple[OpChain, Step]]:
    """Yield each activation with enough elements per channel, once."""
    seen: set[tuple[str, str]] = set()
    for chain in evidence.chains if evidence.watched else ():
        for step in chain.steps[1:]:
            elements = chain.steps[0].elements / max(len(step.active), 1)
            if (
                len(step.active)
                and step.closed >= 0
                and elements >= MIN_ELEMENTS
                and (chain.site, step.module) not in seen
            ):
                seen.add((chain.site, step.module))
                yield chain, step


def _units(evidence: Evidence, chain: OpChain, step: Step, n_dead: int) -> Finding:
    share = n_dead / len(step.active)
    return Finding(
        "dead-units",
        "warning" if share >= _WARNING_SHARE else "info",
        (chain.site,),
        f"{n_dead} of {len(step.active)} channels of {called(chain.site)} ({percent(share)}) were inactive after "
        f"{step.op} on all {evidence.samples} watched samples: they pass no gradient and their weights do not learn.",
        {
            "channels": [channel for channel, active in enumerate(step.active.tolist()) if not active],
            "predicted": step.closed / chain.steps[0].elements,
            "observed": chain.steps[0].zero_share,
            "samples": evidence.samples,
        },
        f"If there are many: {_REMEDY}.",
        _SOURCE,
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
        cause = f"to see what blocks it, {WATCH}"
    return Finding(
        "dead-layer",
        "error",
        tuple(all_zero),
        f"The gradient at {listed(all_zero)} is exactly zero in every batch, but not at other sites; {cause}.",
        {"predicted": None, "observed": 1.0, "starved": all_zero},
        "Look at the operations between the last of these sites and the next one.",
        "all recorded elements are zero",
    )
