"""Zeros between a site and its next reader: how many come from pooling, and how many from an activation.

Max-pooling passes each gradient to the largest element of its window; the others get exactly zero. A ReLU passes it
where its input was positive. The forward pass determines both, so the zeros can be predicted and counted.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .evidence import Evidence, OpChain, Step
from .finding import Finding, called, first_of, listed, percent

_MIN_SHARE = 0.6
_SOURCE_POOLING = (
    "at least 1 - windows / elements of the gradient at the input of max-pooling is zero; 1 - 1/k^2 for k x k windows "
    "that do not overlap"
)
_SOURCE_GATE = (
    "the derivative of max(x, 0) is 0 for x < 0; that is half of a symmetric input, so more than 60 % is reported"
)


def windows(size: int, kernel: int, stride: int, padding: int = 0, dilation: int = 1, ceil_mode: bool = False) -> int:
    """Return how many windows of a pooling fit along one axis.

    In ceil mode the last window may extend past the end if it begins inside the input or the padding before it.

    Source: the output size in the documentation of torch.nn.MaxPool2d.

    >>> windows(7, kernel=2, stride=2), windows(7, kernel=2, stride=2, ceil_mode=True)
    (3, 4)
    """
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    fit = (-(-span // stride) if ceil_mode else span // stride) + 1
    return fit - 1 if ceil_mode and (fit - 1) * stride >= size + padding else fit


def least_zeros(
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] | None = None,
    dilation: Sequence[int] | None = None,
    ceil_mode: bool = False,
) -> float:
    """Return the fraction in [0, 1] of the gradient at the input of max-pooling that must be zero, whatever the values.

    Each window passes its gradient to one element, so at most as many elements as windows can receive any.

    Args:
        shape: spatial shape of the input, one size for each axis.
        kernel, stride, padding, dilation: one for each axis.
        ceil_mode: whether windows may extend past the end.

    >>> least_zeros((28, 28), (2, 2), (2, 2))
    0.75
    >>> round(least_zeros((7, 7), (3, 3), (2, 2)), 4)
    0.8163
    """
    axes = len(shape)
    along = zip(shape, kernel, stride, padding or (0,) * axes, dilation or (1,) * axes, strict=True)
    return _share_without_window(math.prod(windows(*axis, ceil_mode) for axis in along), math.prod(shape))


def _share_without_window(windows: int, elements: int) -> float:
    return 1 - min(windows, elements) / elements


@dataclass(frozen=True)
class ZeroShares:
    """Where the zeros of a site's gradient come from, as fractions of its elements.

    Attributes:
        pooling, activation: made by these steps.
        above: already zero at the far end of the chain.
        predicted_exactly: whether each step's zeros are exactly those predicted from its forward pass.
    """

    pooling: float
    activation: float
    above: float
    predicted_exactly: bool

    @property
    def total(self) -> float:
        """The fraction of elements that are zero, in [0, 1]."""
        return self.pooling + self.activation + self.above


def split(chain: OpChain) -> ZeroShares:
    """Follow a gradient from the far end of a chain back to the site, and count the zeros that each step makes."""
    steps = [chain.steps[0], *chain.pointwise]
    shares = {"pooling": 0.0, "activation": 0.0, "above": steps[-1].zero_share}
    predicted_exactly = True
    for before, step in zip(steps[-2::-1], steps[:0:-1], strict=True):
        share, carried = before.zero_share, sum(shares.values())
        cause, added = "above", 0.0
        if step.kind == "max-pool":
            cause, added = "pooling", step.closed / before.elements
        elif step.kind == "activation":
            cause, added = "activation", share - carried
        # pooling changes the number of elements, so the zeros after it are another share of those before it
        shares = {key: value * (share - added) / carried if carried else 0.0 for key, value in shares.items()}
        shares["above"] += 0.0 if carried else share - added
        shares[cause] += added
        predicted_exactly &= step.expected_zeros < 0 or step.expected_zeros == before.zeros
    return ZeroShares(shares["pooling"], shares["activation"], shares["above"], predicted_exactly)


def pooling(evidence: Evidence) -> Iterator[Finding]:
    """Say what pooling does to the gradients of the sites that it follows: one finding for each of its two kinds."""
    routed: dict[str, tuple[OpChain, Step, Step]] = {}
    spread: dict[str, tuple[OpChain, Step, Step]] = {}
    for chain in evidence.chains:
        if chain.all_zero:
            continue
        for before, step in pairwise([chain.steps[0], *chain.pointwise]):
            if step.kind == "max-pool" and len(step.shape) > 2:
                routed.setdefault(chain.site, (chain, before, step))
            elif (
                step.kind == "average-pool" and math.prod(step.shape[2:]) > 1
            ):  # a mean over the whole plane does not count
                spread.setdefault(chain.site, (chain, before, step))
    if routed:
        yield _routed(routed)
    if spread:
        yield _spread(spread)
    evidence.refuse_unfollowed()


def _routed(at: dict[str, tuple[OpChain, Step, Step]]) -> Finding:
    figures = {site: _routed_figures(*steps) for site, steps in at.items()}
    worst = max(figures, key=lambda site: figures[site]["zeros"])
    chain, _, step = at[worst]
    of = figures[worst]
    between = [step.op for step in chain.pointwise if step.kind == "activation"]
    sentence = (
        f"{percent(of['zeros'])} of the gradient at {called(worst)} is exactly zero: {step} makes "
        f"{percent(of['by_pooling'])}, because each window passes its gradient to one element (at least "
        f"{percent(of['predicted'])} predicted at its input, {percent(of['observed'])} observed)"
    )
    if between:
        sentence += f", and {listed(between)} {percent(of['by_activation'])}"
    if of["arrived_zero"]:
        sentence += f"; {percent(of['arrived_zero'])} was already zero"
    if others := [f"{called(site)} ({percent(figures[site]['zeros'])})" for site in figures if site != worst]:
        sentence += f"; likewise at {first_of(others)}"
    return Finding(
        "pooling",
        "info",
        tuple(at),
        sentence + ".",
        of | ({"by_site": figures} if others else {}),
        "Nothing is wrong: read quantiles of this gradient above the share of zeros, or use average pooling, which "
        "spreads it.",
        _SOURCE_POOLING,
    )


def _routed_figures(chain: OpChain, before: Step, step: Step) -> dict[str, Any]:
    zeros = split(chain)
    predicted, observed = _least_zeros(before, step), before.zero_share
    figures = {"predicted": predicted, "observed": observed, "zeros": zeros.total, "kind": "max"}
    shares = {"by_pooling": zeros.pooling, "by_activation": zeros.activation, "arrived_zero": zeros.above}
    return figures | shares | {"foretold_exactly": zeros.predicted_exactly, "module": step.module, **step.settings}


def _least_zeros(before: Step, step: Step) -> float:
    """Return the least share of zeros at the input of max-pooling; by shapes alone without a padding (as "same")."""
    inputs, outputs = before.shape[2:], step.shape[2:]
    if "padding" not in step.settings:
        return _share_without_window(math.prod(outputs), math.prod(inputs))
    kernel, stride, padding, dilation = (step.settings[key] for key in ("kernel_size", "stride", "padding", "dilation"))
    return least_zeros(inputs, kernel, stride, padding, dilation, step.settings["ceil_mode"])


def _spread(at: dict[str, tuple[OpChain, Step, Step]]) -> Finding:
    figures = {}
    for site, (_, before, step) in at.items():
        predicted = math.prod(step.shape[2:]) / math.prod(before.shape[2:])
        observed = before.mean_magnitude / step.mean_magnitude if step.absolute else 0.0
        figures[site] = {"predicted": predicted, "observed": observed, "kind": "average", "module": step.module}
        figures[site] |= step.settings
    first = next(iter(at))
    of = figures[first]
    sentence = (
        f"{at[first][2]} after {called(first)} spreads the gradient and makes none of it zero: its mean magnitude is "
        f"multiplied by {of['observed']:.3g} ({of['predicted']:.3g} predicted: outputs / inputs)"
    )
    if others := [f"{called(site)} ({figures[site]['observed']:.3g})" for site in figures if site != first]:
        sentence += f"; likewise after {first_of(others)}"
    return Finding(
        "pooling",
        "info",
        tuple(at),
        sentence + ".",
        of | ({"by_site": figures} if others else {}),
        "Nothing is wrong: keep this factor in mind when you compare magnitudes before and after it.",
        "each input in a window of k elements receives 1/k of the gradient of the window's mean",
    )


def activation(evidence: Evidence) -> Iterator[Finding]:
    """Find activations that set more than 60 % of a gradient to zero, or multiply it by a leaky ReLU's slope."""
    gated: dict[str, list[tuple[str, float, ZeroShares]]] = {}
    leaky: dict[str, dict[str, tuple[OpChain, Step]]] = {}
    for chain in evidence.chains:
        steps = chain.pointwise
        if not steps or steps[0].kind != "activation" or steps[0].saturates or chain.all_zero:
            continue
        first, zeros = steps[0], split(chain)
        elements = chain.steps[0].elements
        if first.closed_where_alive > _MIN_SHARE and zeros.activation > max(_MIN_SHARE, zeros.pooling):
            gated.setdefault(first.op, []).append((chain.site, first.closed / elements, zeros))
        elif "negative_slope" in first.settings and _leaking(first) > _MIN_SHARE:
            leaky.setdefault(first.op, {}).setdefault(chain.site, (chain, first))
    for op, rows in gated.items():
        yield _gate(op, rows)
    for at in leaky.values():
        yield _leaky(at)
    evidence.refuse_unfollowed()


def _gate(op: str, rows: list[tuple[str, float, ZeroShares]]) -> Finding:
    sites = tuple(dict.fromkeys(site for site, _, _ in rows))
    worst = max(rows, key=lambda row: row[2].activation)
    sentence = (
        f"{op} has derivative 0 for {percent(worst[1])} of the output of {called(worst[0])}, and "
        f"{percent(worst[2].total)} of the gradient there is exactly zero, {percent(worst[2].activation)} because of it"
    )
    if len(sites) > 1:
        sentence += f"; likewise at {listed(site for site in sites if site != worst[0])}"
    return Finding(
        "activation",
        "info",
        sites,
        sentence + ".",
        {
            "op": op,
            "predicted": [closed for _, closed, _ in rows],
            "observed": [zeros.total for _, _, zeros in rows],
            "by_activation": [zeros.activation for _, _, zeros in rows],
            "foretold_exactly": all(zeros.predicted_exactly for _, _, zeros in rows),
        },
        "If the layer learns too slowly, try a smaller negative bias, batch norm before the activation, or a leaky "
        "ReLU.",
        _SOURCE_GATE,
    )


def _leaking(step: Step) -> float:
    """Return the fraction of a leaky ReLU's inputs that are negative, computed from its mean slope."""
    return float((1 - step.slope) / (1 - step.settings["negative_slope"]))


def _leaky(at: dict[str, tuple[OpChain, Step]]) -> Finding:
    negative = {site: _leaking(step) for site, (_, step) in at.items()}
    worst = max(negative, key=lambda site: negative[site])
    chain, step = at[worst]
    observed, predicted = (
        total / step.absolute if step.absolute else 0.0 for total in (chain.steps[0].absolute, step.expected_absolute)
    )
    sentence = (
        f"{step.op} after {called(worst)} multiplies {percent(negative[worst])} of the gradient by "
        f"{step.settings['negative_slope']:g} and makes none of it zero: its total magnitude falls to {observed:.3g} "
        f"of the incoming gradient's ({predicted:.3g} predicted)"
    )
    if others := [f"{called(site)} ({percent(negative[site])})" for site in at if site != worst]:
        sentence += f"; likewise at {first_of(others)}"
    return Finding(
        "activation",
        "info",
        tuple(at),
        sentence + ".",
        {"op": step.op, "predicted": predicted, "observed": observed, "negative": negative[worst], "by_site": negative},
        "Nothing is wrong; a larger slope would pass more.",
        "the derivative of a leaky ReLU is its slope for x < 0",
    )
