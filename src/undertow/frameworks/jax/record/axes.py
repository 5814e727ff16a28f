"""Which axis of a value holds the samples and which the channels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..modules import EQUINOX, KERAS, library_of
from ..perturbing import Place


@dataclass(frozen=True)
class ValueAxes:
    """The axes of one value.

    Attributes:
        samples: None where the value is one sample's.
        channels: None where there are none.
        certain: the model's library, or the user, says where the samples are; else the first axis is taken for theirs.
    """

    samples: int | None
    channels: int | None
    certain: bool = False

    def letters(self, ndim: int) -> str:
        """Return a letter for each axis: b the samples, c the channels, - any other.

        >>> ValueAxes(0, 3).letters(4)
        'b--c'
        """
        return "".join("b" if i == self.samples else "c" if i == self.channels else "-" for i in range(ndim))

    def arranged(self, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """View a value as `(B, C, ...)`: samples, then channels or features, then the rest."""
        if self.channels is not None:
            x = np.moveaxis(x, self.channels, 0)
        samples = self.samples
        if samples is None:
            x = x[None]
        else:
            if self.channels is not None and samples < self.channels:
                samples += 1
            x = np.moveaxis(x, samples, 0)
        return x.reshape(-1, 1) if x.ndim < 2 else x


class ValueLayouts:
    """The axes of all sites' values: Flax, Keras and functions have the samples first and the channels last, as Keras's
    layers say themselves; Equinox's modules take one sample, whose channels are first.

    Args:
        given: letters for some sites, as in "tbc", for values of as many axes.
    """

    def __init__(self, model: Any, given: Mapping[str, str]) -> None:
        self._library, self._given = library_of(model), given

    def of(self, place: Place, module: Any, ndim: int) -> ValueAxes:
        """Return the axes of a value at a place, without those of the loops around it."""
        letters = self._given.get(place.site)
        if letters is not None and len(letters) == ndim:
            samples, channels = (letters.index(letter) if letter in letters else None for letter in "bc")
            return ValueAxes(samples, channels, certain=True)
        if ndim == 0:
            return ValueAxes(None, None)
        if self._library == EQUINOX:
            channels = place.mapped if place.mapped < ndim else None
            return ValueAxes(0 if place.mapped else None, channels, certain=True)
        channels = ndim - 1 if ndim > 1 else None
        if self._library == KERAS and ndim > 1:
            from ...keras_layers import channel_axis

            channels = channel_axis(module) % ndim
        return ValueAxes(0, channels, certain=place.mapped > 0)
