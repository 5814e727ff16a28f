"""What a pass has shown of the places that are recorded: arrays, which may leave `jax.jit` as any others do."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax

from ..perturbing import Place


@dataclass(frozen=True)
class Seen:
    """The values and gradients at the recorded places of one pass; `Recording.add` takes it.

    Attributes:
        values: at each place; None where the phase is "backward".
        gradients: at each place; None where the phase is "forward", or where no gradient comes to it.
        parameters: gradients of parameters, by name.
        places: what each is.
    """

    values: tuple[Any, ...]
    gradients: tuple[Any, ...]
    parameters: dict[str, Any]
    places: tuple[Place, ...]

    def calls(self) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """Yield for each call of each site the place's position here, the call's number, and where it is in loops."""
        counts: dict[tuple[str, str], int] = {}
        done: set[int] = set()
        for i, place in enumerate(self.places):
            if i in done:
                continue
            key, loops = (place.site, place.position), place.loops
            later = enumerate(self.places[i:], i) if loops else [(i, place)]
            together = [j for j, other in later if (other.site, other.position, other.loops) == (*key, loops)]
            done.update(together)
            for step in _steps(place):
                for j in together:
                    yield j, counts.get(key, 0), step
                    counts[key] = counts.get(key, 0) + 1


def _steps(place: Place) -> Iterator[tuple[int, ...]]:
    """Yield the positions of loops' steps, in the order in which they run."""
    return itertools.product(*(range(n.length)[::-1] if n.backwards else range(n.length) for n in place.loops))


jax.tree_util.register_dataclass(Seen, ["values", "gradients", "parameters"], ["places"])
