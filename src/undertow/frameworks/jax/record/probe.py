"""A probe of one batch, which is given what passes have shown: JAX's functions are pure, so no hook can sit in them."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import jax
import numpy as np

from ....errors import InputError
from ....measures import Measure, reduce_all
from ...results import HostObservations, Observation, TensorKey
from ..arrays import to_numpy
from ..perturbing import Place
from .axes import ValueLayouts
from .seen import Seen, calls_of_places

_open = threading.local()


def world() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    return jax.process_index(), jax.process_count()


def layouts(model: Any, given: Mapping[str, str]) -> ValueLayouts:
    """Return the axes of all sites' values."""
    return ValueLayouts(model, given)


def new_probe(
    modules: Mapping[str, Any],
    measures: Sequence[Measure],
    phases: frozenset[str],
    scaler: Any,
    watched: Any,
    layouts: Any = None,
    n_samples: int | None = None,
) -> "SeenProbe":
    """Return a probe of places.

    Raises:
        InputError: a diagnosis or a scaler is asked for.
    """
    if watched is not None:
        raise InputError("diagnose is not there for JAX yet: its proofs follow torch's operations; record without it")
    if scaler is not None:
        raise InputError("scaler= is of torch and Keras; in JAX divide the scale out in the loss")
    return SeenProbe(modules, measures, phases, layouts, n_samples)


def current() -> "SeenProbe":
    """Return the probe that was entered last in this thread, for the pass of `objective`."""
    probe: SeenProbe = _open.probes[-1]
    return probe


@dataclass
class SeenProbe:
    """Reads the sites of one batch, see `BatchProbe`.

    Attributes:
        observations: in order of arrival.
        order: the sites in the order in which they first gave an output.
        arrived: the sites that a gradient has reached.
        views, unread, unscaled, scale, inputs: nothing; see `BatchProbe`.
    """

    modules: Mapping[str, Any]
    measures: Sequence[Measure]
    phases: frozenset[str]
    layouts: ValueLayouts
    n_samples: int | None = None
    observations: list[Observation] = field(default_factory=list)
    order: dict[str, None] = field(default_factory=dict)
    arrived: set[str] = field(default_factory=set)
    views: set[str] = field(default_factory=set)
    unread: dict[str, str] = field(default_factory=dict)
    unscaled: bool = False
    scale: float | None = None
    inputs: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._runs = 0
        self._called: dict[tuple[str, str], int] = {}

    def __enter__(self) -> Self:
        _open.probes = [*getattr(_open, "probes", ()), self]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _open.probes = [probe for probe in _open.probes if probe is not self]

    def diagnosis_points(self, names: Sequence[str]) -> list[Any]:
        """Return nothing: diagnosis is not there for JAX yet."""
        return []

    def transfer(self, points: Sequence[Any], others: Sequence[Observation] = ()) -> HostObservations:
        """Return what was observed, here and by others, which is on the host already."""
        return HostObservations([*self.observations, *others])

    def add(self, seen: Seen) -> None:
        """Observe what one pass has shown: values first, then gradients from the last place to the first."""
        self._refuse(seen)
        before = dict(self._called)
        calls = list(calls_of_places(seen.places))
        values = {i: to_numpy(x) for i, x in enumerate(seen.values) if x is not None}
        gradients = {i: to_numpy(x) for i, x in enumerate(seen.gradients) if x is not None}
        for i, number, step in calls:
            place = seen.places[i]
            key = (place.site, place.position)
            self.order[place.site] = None
            self._called[key] = before.get(key, 0) + number + 1
            if i in values:
                dtype = str(seen.values[i].dtype)
                self._observe(place, before.get(key, 0) + number, "forward", values[i][step], dtype)
        for i, number, step in reversed(calls):
            place = seen.places[i]
            if i in gradients:
                self.arrived.add(place.site)
                number += before.get((place.site, place.position), 0)
                self._observe(place, number, "backward", gradients[i][step], str(seen.gradients[i].dtype))
        self._runs += 1

    def _refuse(self, seen: Any) -> None:
        if not isinstance(seen, Seen):
            raise InputError(
                f"seen is a {type(seen).__name__}; pass what came third out of the function of recording.value_and_grad"
            )
        for array in jax.tree.leaves(seen):
            if isinstance(array, jax.core.Tracer):
                raise InputError("recording.add was called inside jax.jit; return `seen` from it, and add it outside")
            if isinstance(array, jax.Array) and not array.is_fully_addressable:
                raise InputError(
                    "what was seen lies on devices of other processes too; gather it first, as with "
                    "jax.experimental.multihost_utils.process_allgather"
                )

    def _observe(self, place: Place, call: int, phase: str, original: Any, dtype: str) -> None:
        original = np.asarray(original)
        axes = self.layouts.of(place, self.modules.get(place.site), original.ndim)
        x = axes.arranged(original)
        states = reduce_all(self.measures, x, original, axes.samples)
        key = TensorKey(place.site, call, place.position, phase)
        facts = original.ndim > 0, axes.certain, axes.letters(original.ndim), self._runs
        self.observations.append(Observation(key, 0, dtype, len(x), states, *facts))
