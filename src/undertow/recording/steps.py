"""The parameters among the sites of a recording, and a batch that has ended but waits for the steps behind it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..frameworks.base import BatchProbe, NamedParameter, ParameterProbe, Recorder
from ..frameworks.results import Observation
from .writer import Batch

FROZEN = "it is frozen: requires_grad is False"


@dataclass(frozen=True)
class Learning:
    """The parameters among the sites, by name, the optimizers, and each parameter's optimizer and group, if any."""

    parameters: Mapping[str, Any]
    optimizers: Sequence[Any]
    places: Mapping[str, tuple[int, int] | None]

    def to_dict(self) -> dict[str, Any]:
        """Return what the manifest says of each parameter."""
        return {
            name: {
                "shape": list(parameter.shape),
                "trainable": bool(parameter.requires_grad),
                **dict(zip(("optimizer", "group"), self.places.get(name) or (None, None), strict=True)),
            }
            for name, parameter in self.parameters.items()
        }

    def why_none(self, name: str) -> str:
        """Say why nothing was recorded of a parameter."""
        dtype = str(self.parameters[name].dtype).removeprefix("torch.")
        if "float" not in dtype:
            return f"it is {dtype}, which no measure reads"
        if not self.parameters[name].requires_grad:
            return FROZEN
        if not self.optimizers:
            return "no gradient came to it inside a batch"
        if self.places[name] is None:
            return "it is in no optimizer that was given"
        return "no step of its optimizer, in a recorded batch or behind it, had a gradient for it"


@dataclass
class EndedBatch:
    """A batch that waits for the steps that may come behind it."""

    epoch: int
    number: int
    names: list[str] | None
    size: int
    sites: Sequence[str]
    facts: dict[str, Any]
    probe: BatchProbe
    points: Sequence[Any]
    parameters: ParameterProbe | None
    described: Mapping[str, Sequence[Any]]

    @property
    def arrived(self) -> set[str]:
        """The modules at which a gradient has come, and the parameters of which anything was read."""
        of_parameters = () if self.parameters is None else self.parameters.observations
        return self.probe.arrived | {observation.key.site for observation in of_parameters}

    @property
    def observed(self) -> bool:
        """Whether anything was recorded."""
        return bool(self.probe.observations or (self.parameters is not None and self.parameters.arrived))

    def close(self) -> Batch:
        """Watch the optimizers no longer, and return what the batch and the steps left."""
        steps: Sequence[dict[str, Any]] = ()
        others: Sequence[Observation] = ()
        if self.parameters is not None:
            self.parameters.close()
            steps, others = self.parameters.steps, self.parameters.observations
        transfer = self.probe.transfer(self.points, others)
        keys = (self.epoch, self.number, self.names, self.size, self.sites, self.facts)
        return Batch(*keys, self.probe.scale, self.points, transfer, steps, self.described)


def learning_of(
    recorder: Recorder, selected: Sequence[str], parameters: Sequence[NamedParameter], optimizer: Any
) -> Learning:
    """Return what is to be read of parameters.

    Args:
        selected: their names.
        parameters: all of the network's.
        optimizer: as the user gave it: one, several, or None.

    Raises:
        InputError: no optimizer, or one that steps none of them.
    """
    by_name = {named.name: named.parameter for named in parameters}
    chosen = {name: by_name[name] for name in selected}
    optimizers = () if optimizer is None else recorder.optimizers_of(optimizer)
    places = recorder.optimizer_groups(chosen, optimizers)
    if optimizers and not chosen:
        raise InputError("optimizer= is given, but no site is a parameter; add 'params' to sites")
    if optimizers and not any(places.values()):
        raise InputError(
            f"none of the {len(chosen)} parameters among the sites is in the optimizer; was it made for a copy?"
        )
    return Learning(chosen, optimizers, places)
