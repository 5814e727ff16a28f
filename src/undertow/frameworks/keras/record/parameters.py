"""Parameters as sites, which are not there for Keras yet: a network has none to offer, and an optimizer is refused."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ....errors import InputError
from ....measures import Measure
from ...base import NamedParameter


def named_parameters(model: Any) -> list[NamedParameter]:
    """Return none."""
    return []


def optimizers_of(optimizer: Any) -> NoReturn:
    """Refuse.

    Raises:
        InputError: always.
    """
    raise InputError("optimizer= is not there for Keras yet; record without it")


def optimizer_groups(parameters: Mapping[str, Any], optimizers: Sequence[Any]) -> dict[str, Any]:
    """Return none."""
    return {}


def new_parameter_probe(
    parameters: Mapping[str, Any], measures: Sequence[Measure], optimizers: Sequence[Any], scaler: Any
) -> NoReturn:
    """Refuse.

    Raises:
        InputError: always.
    """
    raise InputError("parameters as sites are not there for Keras yet; select layers")
