"""What the rest of the library asks of a framework, and how the right one is found without importing the others."""

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from ..errors import FrameworkError, InputError
from ..rules import Rule


@dataclass(frozen=True)
class Request:
    """One explanation as asked for, already checked where no framework is needed."""

    model: Callable[..., Any]
    inputs: tuple[Any, ...]
    rule: Rule
    rule_name: str
    target: Any
    through: str
    activations: str
    training: bool


@dataclass
class Met:
    """What a rule met on the way from the scores to the inputs."""

    rewired: int = 0
    switches: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    opaque: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """One explanation as a framework gives it: a map for each input, None for an input that has no gradient.

    Attributes:
        channels_last: images are `(B, H, W, C)`, not `(B, C, H, W)`.
    """

    maps: tuple[Any, ...]
    targets: Any
    scores: Any
    met: Met
    channels_last: bool = False


@dataclass(frozen=True)
class Inside:
    """What one pass left at some layers, as NumPy, by the layer's name.

    Attributes:
        answer: of the pass itself, as `explain` gives it; its maps are None where directions were asked for.
        values: each layer's output, `(B, ...)`.
        gradients: what flowed back to it under the rule, `(B, K, ...)`, for K targets or directions.
        at_input: what flowed back to the input, `(B, K, ...)`.
    """

    answer: Answer
    values: dict[str, npt.NDArray[Any]]
    gradients: dict[str, npt.NDArray[Any]]
    at_input: npt.NDArray[Any]


class Backend(Protocol):
    """A framework, as `explain` sees it."""

    def explain(self, request: Request) -> Answer: ...

    def to_numpy(self, tensor: Any) -> npt.NDArray[Any]: ...

    def like(self, array: npt.NDArray[Any], x: Any) -> Any: ...

    def scores(self, model: Callable[..., Any], x: Any) -> npt.NDArray[Any]: ...

    def layers(self, model: Any, x: Any) -> list[str]: ...

    def redrawn(self, model: Any, layers: Sequence[str], seed: int) -> Any: ...

    def inside(self, request: Request, layers: Sequence[str], directions: npt.NDArray[Any] | None = None) -> Inside: ...

    def batch(self, arrays: Sequence[npt.NDArray[Any]], device: str) -> Any: ...

    def probabilities(self, model: Callable[..., Any], x: Any) -> npt.NDArray[Any]: ...

    def device(self, name: str) -> str: ...

    def place(self, model: Any, device: str) -> None: ...

    def objective(
        self, model: Any, name: str
    ) -> AbstractContextManager[Callable[[Any, Sequence[int] | None], None]]: ...


def backend_of(value: Any, model: Any = None) -> Backend:
    """Return the backend that a tensor belongs to; that of the model, where the value is a NumPy array.

    Raises:
        InputError: the value is no tensor of a known framework.
        FrameworkError: the framework is not installed.
    """
    roots = _roots(value)
    if "torch" in roots:
        return load("torch")
    if roots & _KERAS or (roots & {"numpy"} and runs_on_tensorflow(model)):
        return load("keras")
    remedy = "; use torch.from_numpy(x)" if isinstance(value, np.ndarray) else ""
    raise InputError(f"x is a {type(value).__name__}, not a torch tensor or a tuple of them{remedy}")


def backend_of_model(model: Any) -> Backend:
    """Return the backend that a network runs on: torch, unless it is one of Keras or TensorFlow.

    Raises:
        FrameworkError: the framework is not installed.
    """
    return load("keras" if runs_on_tensorflow(model) else "torch")


def as_numpy(value: Any) -> npt.NDArray[Any]:
    """Copy a tensor of any framework, or an array, to NumPy."""
    return value.copy() if isinstance(value, np.ndarray) else backend_of(value).to_numpy(value)


_KERAS = frozenset(("keras", "tensorflow", "tf_keras"))


def runs_on_tensorflow(model: Any) -> bool:
    """Whether a network is of Keras or TensorFlow, and not of Keras on torch."""
    roots = _roots(model)
    return bool(roots & _KERAS) and "torch" not in roots  # a Keras network on torch is a torch.nn.Module


def _roots(value: Any) -> set[str]:
    """Return the packages that a value's classes come from."""
    return {cls.__module__.partition(".")[0] for cls in type(value).__mro__}


def load(name: str) -> Backend:
    """Import one backend by its name.

    Raises:
        FrameworkError: the framework is not installed.
    """
    try:
        return cast(Backend, importlib.import_module(f".{name}", __package__))
    except ModuleNotFoundError as error:
        if error.name not in (name, "tensorflow"):
            raise
        raise FrameworkError(f'{name} is not installed; run: pip install "undertow[{name}]"') from error
