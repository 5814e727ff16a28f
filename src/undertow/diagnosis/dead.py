"""Units and layers that are inactive on every sample: what they starve, and where the gradient ends."""

from collections.abc import Iterator

from .evidence import WATCH, Evidence, Passage, Step
from .finding import Finding, called, listed, percent

ENOUGH = 100
_MANY = 0.1
_SOURCE = f"a channel counts as dead if all of at least {ENOUGH} elements seen were closed; cf. arXiv 1903.06733"
_REMEDY = "a smaller learning rate, He initialisation, batch norm before the activation, or a leaky activation"


def dead(evidence: Evidence) -> Iterator[Finding]:
    """Find channels, and whole layers, to which an activation was closed on every sample seen."""
    starved = [site for site, (zeros, total) in evidence.zeros.items() if zeros == total > 0]
    layers: list[tuple[Passage, Step]] = []
    for passage, step in _activations(evidence):
        quiet = int((step.active == 0).sum())
        if quiet == len(step.active):
            layers.append((passage, step))
        elif quiet:
            yield _units(evidence, passage, step, quiet)
    if layers:
        yield _layer(evidence, layers, starved)
    elif starved and len(starved) < len(evidence.zeros):
        yield _nothing_passes(evidence, starved)


def _activations(evidence: Evidence) -> Iterator[tuple[Passage, Step]]:
    """Yield each activation of which enough was seen, once."""
    met: set[tuple[str, str]] = set()
    for passage in evidence.passages if evidence.watched else ():
        for step in passage.steps[1:]:
            seen = passage.steps[0].elements / max(len(step.active), 1)
            if len(step.active) and step.closed >= 0 and seen >= ENOUGH and (passage.site, step.module) not in met:
                met.add((passage.site, step.module))
                yield passage, step


def _units(evidence: Evidence, passage: Passage, step: Step, quiet: int) -> Finding:
    share = quiet / len(step.active)
    return Finding(
        "dead-units",
        "warning" if share >= _MANY else "info",
        (passage.site,),
        f"{quiet} of {len(step.active)} channels of {called(passage.site)} ({percent(share)}) were inactive behind "
        f"{step.op} on all {evidence.samples} samples seen: they pass no gradient and their weights do not learn.",
        {
            "channels": [place for place, active in enumerate(step.active.tolist()) if not active],
            "predicted": step.closed / passage.steps[0].elements,
            "observed": passage.steps[0].zeros / passage.steps[0].elements,
            "samples": evidence.samples,
        },
        f"If there are many: {_REMEDY}.",
        _SOURCE,
    )


def _layer(evidence: Evidence, layers: list[tuple[Passage, Step]], starved: list[str]) -> Finding:
    passage, step = layers[-1]  # nearest to the loss: the first that the gradient meets
    others = [one.site for one, _ in layers[:-1]]
    where = f"{step.op}{f' in {called(step.module)}' if step.module else ''}"
    below = [site for site in starved if evidence.place[site] <= evidence.place[passage.site]]
    sentence = (
        f"Every unit of {called(passage.site)} was inactive behind {where} on all {evidence.samples} samples seen: "
        f"no gradient passes there, and exactly zero arrives at {listed(below)}."
    )
    if others:
        sentence += f" Also dead: {listed(others)}."
    return Finding(
        "dead-layer",
        "error",
        tuple(dict.fromkeys([*below, passage.site])),
        sentence,
        {
            "dead": [one.site for one, _ in layers],
            "starved": below,
            "predicted": 1.0,
            "observed": _least(evidence, below),
        },
        f"Start again with {_REMEDY}; what is dead does not come back by itself.",
        _SOURCE,
    )


def _least(evidence: Evidence, sites: list[str]) -> float:
    return min((evidence.zeros[site][0] / evidence.zeros[site][1] for site in sites), default=float("nan"))


def _nothing_passes(evidence: Evidence, starved: list[str]) -> Finding:
    """Word what is sure without a closer look: some sites get nothing, others get something."""
    if evidence.watched:
        cause = "no activation behind them is closed throughout, so the zeros come from the function that reads them"
    else:
        cause = f"to see what stops it, {WATCH}"
    return Finding(
        "dead-layer",
        "error",
        tuple(starved),
        f"The gradient at {listed(starved)} is exactly zero in every batch, while other sites get some: {cause}.",
        {"predicted": None, "observed": 1.0, "starved": starved},
        "Look at what stands between the last of these and the next site.",
        "all recorded elements are zero",
    )
