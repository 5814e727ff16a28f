"""Parameters as sites: the gradients by them, as the function of `value_and_grad` returns them."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self

import jax
import jax.numpy as jnp

from ....errors import InputError
from ....measures import Measure, reduce_all
from ...base import NamedParameter
from ...results import Observation, TensorKey
from ..arrays import to_numpy
from ..marks import dotted, is_float
from ..models import own_model
from ..modules import KERAS, LINEN, NNX, TRACE, library_of
from .seen import Seen


@dataclass(frozen=True)
class JaxParameter:
    """What is known of a parameter beforehand."""

    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool = True


def named_parameters(model: Any) -> list[NamedParameter]:
    """List every parameter, in the order of the model's own tree; a function has none to name."""
    return [
        NamedParameter((path,), JaxParameter(tuple(x.shape), str(x.dtype)))
        for path, x in zip(*_parameters(model), strict=True)
        if jnp.issubdtype(x.dtype, jnp.floating)
    ]


def _parameters(model: Any) -> tuple[list[str], list[Any]]:
    library, model = library_of(model), own_model(model)
    if library in ("", TRACE):
        return [], []
    if library == KERAS:
        variables = model.trainable_variables
        return [v.path.replace("/", ".") for v in variables], [v.value for v in variables]
    if library == NNX:
        nnx = sys.modules["flax.nnx"]
        tree = nnx.state(model, nnx.Param)
    else:
        tree = model.variables["params"] if library == LINEN else model
    arrays = [(dotted(path), x) for path, x in jax.tree.flatten_with_path(tree)[0] if is_float(x)]
    return [path for path, _ in arrays], [x for _, x in arrays]


def optimizers_of(optimizer: Any) -> NoReturn:
    """Refuse.

    Raises:
        InputError: always.
    """
    raise InputError("optimizer= is of torch: in JAX steps are the user's own; record the gradients, sites='params'")


def optimizer_groups(parameters: Mapping[str, Any], optimizers: Sequence[Any]) -> dict[str, Any]:
    """Return none."""
    return dict.fromkeys(parameters)


def new_parameter_probe(
    parameters: Mapping[str, Any], measures: Sequence[Measure], optimizers: Sequence[Any], scaler: Any
) -> "GradientProbe":
    """Return a probe of parameters' gradients in one batch."""
    return GradientProbe(parameters, measures)


@dataclass
class GradientProbe:
    """Reads the gradients of parameters in one batch: those of the pass that was added last.

    Attributes:
        observations: in the order of the parameters.
        steps: nothing.
    """

    parameters: Mapping[str, Any]
    measures: Sequence[Measure]
    observations: list[Observation] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)

    @property
    def arrived(self) -> bool:
        """Whether a gradient has come to any of them."""
        return bool(self.observations)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None: ...

    def close(self) -> None:
        """Do nothing."""

    def add(self, seen: Seen) -> None:
        """Observe the gradients of one pass, each as one sample whose channels are its first axis."""
        self.observations = []
        for name in self.parameters:
            gradient = seen.parameters.get(name)
            if gradient is None:
                continue
            x = to_numpy(gradient)
            states = reduce_all(self.measures, x.reshape(1, -1) if x.ndim == 0 else x[None], x, samples=None)
            key = TensorKey(name, 0, "", "gradient")
            self.observations.append(Observation(key, 0, str(gradient.dtype), 1, states, sampled=False, first=-1))
