"""Captum's NoiseTunnel: any method's attributions over noisy inputs, averaged."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, did_you_mean
from .arguments import Tensors, as_tuple, baselines_like
from .method import Method

TYPES = ("smoothgrad", "smoothgrad_sq", "vargrad")


class NoiseTunnel(Method):
    """SmoothGrad, its square, or the variance, around any method, one of Captum's own too.

    Each noisy batch goes through alone, so further arguments and targets stay as they are, and no sample meets another
    copy of itself. After `torch.manual_seed` the noise is Captum's.

    Source: Smilkov et al. 2017, arXiv 1706.03825; VarGrad, Adebayo et al. 2018, arXiv 1810.03307.
    """

    def __init__(self, attribution_method: Any) -> None:
        super().__init__(attribution_method.forward_func)
        self.attribution_method = attribution_method

    @property
    def multiplies_by_inputs(self) -> bool:
        """As of the method within."""
        return bool(self.attribution_method.multiplies_by_inputs)

    def has_convergence_delta(self) -> bool:
        """As of the method within."""
        return bool(self.attribution_method.has_convergence_delta())

    def attribute(
        self,
        inputs: Tensors,
        nt_type: str = "smoothgrad",
        nt_samples: int = 5,
        nt_samples_batch_size: int | None = None,
        stdevs: float | tuple[float, ...] = 1.0,
        draw_baseline_from_distrib: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return averaged attributions, one like each of the method's own.

        Args:
            inputs: as of the method within.
            nt_type: "smoothgrad" (the mean), "smoothgrad_sq" (of squares) or "vargrad" (the variance).
            nt_samples: noisy copies of each sample.
            nt_samples_batch_size: how many copies' noise is drawn at once, at most.
            stdevs: the noise's standard deviation, one for each input or one for all; in the input's unit.
            draw_baseline_from_distrib: give each noisy copy of a sample a random row of `baselines`.
            kwargs: the method's own arguments. With `return_convergence_delta`, the deltas of all copies come too,
                `(B * nt_samples,)`, those of a sample one behind the other.
        """
        if nt_type not in TYPES:
            raise InputError(
                f"unknown nt_type {nt_type!r}{did_you_mean(str(nt_type), TYPES)} (known: {', '.join(TYPES)})"
            )
        if nt_samples < 1:
            raise InputError(f"nt_samples={nt_samples} must be 1 or more")
        given = as_tuple(inputs)
        with_delta = bool(kwargs.get("return_convergence_delta")) and self.has_convergence_delta()
        sums, squares, deltas = list[Tensor](), list[Tensor](), list[Tensor]()
        is_tuple = False
        for size in _sizes(nt_samples, nt_samples_batch_size):
            noise = [_noise(x, stdev, size) for x, stdev in zip(given, _stdevs(stdevs, given), strict=True)]
            drawn = _drawn(kwargs, given, size) if draw_baseline_from_distrib else None
            several = list[Tensor]()
            for copy in range(size):
                noisy = tuple(x.detach() + n[:, copy] for x, n in zip(given, noise, strict=True))
                chosen = kwargs if drawn is None else {**kwargs, "baselines": tuple(row[:, copy] for row in drawn)}
                result = self.attribution_method.attribute(noisy if isinstance(inputs, tuple) else noisy[0], **chosen)
                result, delta = result if with_delta else (result, None)
                several += [] if delta is None else [delta]
                is_tuple = isinstance(result, tuple)
                maps = [m.detach() for m in as_tuple(result)]
                sums = maps if not sums else [a + b for a, b in zip(sums, maps, strict=True)]
                squares = [m**2 + (squares[i] if len(squares) > i else 0) for i, m in enumerate(maps)]
            deltas += [torch.stack(several, 1).flatten()] if several else []
        means, of_squares = [s / nt_samples for s in sums], [s / nt_samples for s in squares]
        variances = [square - mean**2 for mean, square in zip(means, of_squares, strict=True)]
        values = tuple({"smoothgrad": means, "smoothgrad_sq": of_squares, "vargrad": variances}[nt_type])
        attributions = values if is_tuple else values[0]
        return (attributions, torch.cat(deltas)) if with_delta else attributions


def _sizes(nt_samples: int, at_once: int | None) -> Iterator[int]:
    """Yield how many copies' noise is drawn in turn."""
    size = nt_samples if at_once is None else min(nt_samples, at_once)
    if size < 1:
        raise InputError(f"nt_samples_batch_size={at_once} must be 1 or more")
    yield from [size] * (nt_samples // size)
    if nt_samples % size:
        yield nt_samples % size


def _stdevs(stdevs: Any, inputs: Sequence[Tensor]) -> tuple[float, ...]:
    several = stdevs if isinstance(stdevs, tuple) else (stdevs,) * len(inputs)
    if len(several) != len(inputs):
        raise InputError(f"there are {len(several)} stdevs for {len(inputs)} inputs; pass one for each, or a number")
    return several


def _noise(x: Tensor, stdev: float, copies: int) -> Tensor:
    """Return noise `(B, copies, ...)`, drawn as Captum draws it: in float32, the copies of a sample in a row."""
    shape = (len(x) * copies, *x.shape[1:])
    drawn = torch.normal(0, torch.tensor(float(stdev), device=x.device).repeat(shape))
    return drawn.view(len(x), copies, *x.shape[1:]).to(x.dtype)


def _drawn(kwargs: dict[str, Any], inputs: Sequence[Tensor], copies: int) -> list[Tensor] | None:
    """Return rows of the baselines for each copy of each sample, `(B, copies, ...)`."""
    if kwargs.get("baselines") is None:
        return None
    given = kwargs["baselines"] if isinstance(kwargs["baselines"], tuple) else (kwargs["baselines"],)
    batch, rows = len(inputs[0]), list[Tensor]()
    for baseline, x in zip(given, inputs, strict=True):
        if isinstance(baseline, Tensor):
            chosen = np.random.choice(len(baseline), copies * batch)  # noqa: NPY002  Captum's generator, for its seeds
            rows.append(baseline[torch.as_tensor(chosen)].view(batch, copies, *baseline.shape[1:]))
        else:
            (full,) = baselines_like(baseline, [x])
            rows.append(full.unsqueeze(1).expand(batch, copies, *x.shape[1:]))
    return rows
