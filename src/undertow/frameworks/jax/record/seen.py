"""What a pass has shown of the places that are recorded: arrays, which may leave `jax.jit` as any others do."""

import itertools
from collections.abc import Iterator, Sequence
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


def calls_of_places(places: Sequence[Place]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Yield for each call of each place its position here, the call's number, and where it is in the loops around."""
    counts: dict[tuple[str, str, str], int] = {}
    done: set[int] = set()
    for i, place in enumerate(places):
        if i in done:
            continue
        key, loops = _key(place), place.loops
        later = enumerate(places[i:], i) if loops else [(i, place)]
        together = [j for j, other in later if (_key(other), other.loops) == (key, loops)]
        done.update(together)
        for step in _steps(place):
            for j in together:
                yield j, counts.get(key, 0), step
                counts[key] = counts.get(key, 0) + 1


def _key(place: Place) -> tuple[str, str, str]:
    return place.site, place.role, place.position


def _steps(place: Place) -> Iterator[tuple[int, ...]]:
    """Yield the positions of loops' steps, in the order in which they run."""
    return itertools.product(*(range(n.length)[::-1] if n.backwards else range(n.length) for n in place.loops))


jax.tree_util.register_dataclass(Seen, ["values", "gradients", "parameters"], ["places"])
