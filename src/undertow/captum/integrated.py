"""Captum's IntegratedGradients: an integral of gradients from a baseline to the input, by one of five quadratures."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, did_you_mean
from ..frameworks.base import capability
from .arguments import Tensors, as_tuple, baselines_like, like, repeated, repeated_all, request_for
from .method import Method, gradients

METHODS = ("gausslegendre", "riemann_left", "riemann_right", "riemann_middle", "riemann_trapezoid")
CPU_BATCH = 8, 2**20  # samples, or elements of them, at once; more gain nothing on a CPU and cost memory


def quadrature(method: str, n_steps: int) -> tuple[list[float], list[float]]:
    """Return where on the line from 0 to 1 gradients are taken, and their weights, which add up to 1.

    Raises:
        InputError: no such method, or too few steps.

    >>> quadrature("riemann_trapezoid", 3)
    ([0.0, 0.5, 1.0], [0.25, 0.5, 0.25])
    """
    if method not in METHODS:
        hint = did_you_mean(str(method), METHODS)
        raise InputError(f"unknown method {method!r}{hint} (known: {', '.join(METHODS)})")
    least = 1 if method == "gausslegendre" else 2
    if n_steps < least:
        raise InputError(f"n_steps={n_steps} is too few for {method}; take {least} or more")
    if method == "gausslegendre":
        places, weights = np.polynomial.legendre.leggauss(n_steps)
        return ((1 + places) / 2).tolist(), (weights / 2).tolist()
    if method == "riemann_trapezoid":
        inner = np.full(n_steps, 1 / (n_steps - 1))
        inner[[0, -1]] /= 2
        return np.linspace(0, 1, n_steps).tolist(), inner.tolist()
    first = {"riemann_left": 0.0, "riemann_right": 1.0, "riemann_middle": 0.5}[method]
    return ((np.arange(n_steps) + first) / n_steps).tolist(), [1 / n_steps] * n_steps


class IntegratedGradients(Method):
    """The mean gradient between a baseline and the input, times their difference.

    Args:
        forward_func: as of every method.
        multiply_by_inputs: False leaves the difference out.

    Source: Sundararajan et al. 2017, arXiv 1703.01365.
    """

    def __init__(self, forward_func: Callable[..., Any], multiply_by_inputs: bool = True) -> None:
        super().__init__(forward_func)
        self._multiply_by_inputs = multiply_by_inputs

    @property
    def multiplies_by_inputs(self) -> bool:
        """As the constructor was told."""
        return self._multiply_by_inputs

    def has_convergence_delta(self) -> bool:
        """True."""
        return True

    def attribute(
        self,
        inputs: Tensors,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
    ) -> Any:
        """Return attributions, one like each input; with `return_convergence_delta` also how far they miss, `(B,)`.

        Args:
            inputs, target, additional_forward_args: as of `Saliency.attribute`.
            baselines: a number, a tensor like the input or like one sample, a tuple of these; None is zero.
            n_steps: points on the line.
            method: "gausslegendre", "riemann_left", "riemann_right", "riemann_middle" or "riemann_trapezoid".
            internal_batch_size: samples at once, at most, and one point of the whole batch at least; None: 8 on a CPU,
                more of small ones, all on a GPU. Where samples of a batch change one another's scores, one point.
        """
        given = as_tuple(inputs)
        starts = baselines_like(baselines, given)
        line = _Line(self.forward_func, given, starts, target, additional_forward_args)
        maps = line.mean_gradients(*quadrature(method, n_steps), _points_at_once(given, n_steps, internal_batch_size))
        if self._multiply_by_inputs:
            maps = tuple(m * (x.detach() - start) for m, x, start in zip(maps, given, starts, strict=True))
        if not return_convergence_delta:
            return like(inputs, maps)
        delta = self.compute_convergence_delta(maps, starts, given, target, additional_forward_args)
        return like(inputs, maps), delta


def _points_at_once(inputs: tuple[Tensor, ...], n_steps: int, size: int | None) -> int:
    """Return how many points of the whole batch go through the network at once."""
    batch = max(1, len(inputs[0]))
    if size is None and inputs[0].device.type != "cpu":
        return n_steps
    samples, elements = CPU_BATCH
    size = size or max(samples, elements * batch // max(1, sum(x.numel() for x in inputs)))
    return max(1, size // batch)


@dataclass(frozen=True)
class _Line:
    """The points between baselines and inputs, at which gradients are taken."""

    forward_func: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    starts: tuple[Tensor, ...]
    target: Any
    more: Any

    def mean_gradients(self, places: list[float], weights: list[float], at_once: int) -> tuple[Tensor, ...]:
        """Return the weighted sum of the gradients at the places, of which so many share a batch."""
        at_once = at_once if at_once > 1 and self._may_share_a_batch() else 1
        totals = [torch.zeros_like(x) for x in self.inputs]
        for first in range(0, len(places), at_once):
            shares = places[first : first + at_once]
            for total, stacked in zip(totals, self._gradients(shares), strict=True):
                rows = stacked.view(len(shares), *total.shape)
                for weight, row in zip(weights[first : first + at_once], rows, strict=True):
                    total += weight * row
        return tuple(totals)

    def _points(self, shares: list[float]) -> tuple[Tensor, ...]:
        pairs = list(zip(self.inputs, self.starts, strict=True))
        return tuple(torch.cat([start + share * (x.detach() - start) for share in shares]) for x, start in pairs)

    def _gradients(self, shares: list[float]) -> tuple[Tensor, ...]:
        target, more = self._repeated(len(shares))
        return gradients(self.forward_func, self._points(shares), target, more)

    def _repeated(self, times: int) -> tuple[Any, Any]:
        batch = len(self.inputs[0])
        return repeated(self.target, times, batch), repeated_all(self.more, times, batch)

    def _may_share_a_batch(self) -> bool:
        """Whether the inputs keep their scores behind their baselines in one batch: no sample changes another's."""
        try:
            target, more = self._repeated(2)
            both, alone = self._scores(self._points([0.0, 1.0]), target, more), self._scores(self.inputs, self.target)
        except Exception:  # whatever somebody's model raises for a larger batch
            return False
        difference = (both[-len(alone) :] - alone).abs().max()
        return bool(difference <= 1e-4 * alone.abs().max().clamp(min=1e-6))

    def _scores(self, inputs: tuple[Tensor, ...], target: Any, more: Any = None) -> Tensor:
        request = request_for(self.forward_func, inputs, target, self.more if more is None else more)
        return capability("torch", "explain").explain(request).scores  # type: ignore[no-any-return]
