"""What the rest of the library asks of a framework, and how its folder is found without importing the others.

A framework is a folder here and a row of `FRAMEWORKS`; what it can do are the files in that folder, under the names of
`CAPABILITIES`. A missing file is something that the framework cannot do yet, and `capability` says so.
`contracts.py` lets mypy hold each of those files to its contract below.
"""

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self, overload

import numpy as np
import numpy.typing as npt

from ..errors import FrameworkError, InputError, ModelError, RuleError
from ..inputs import ModelArguments
from ..installing import install_command
from ..measures import Measure
from ..outputs import Path
from ..structures import is_tensor
from ..tables import ActivationRule, AttentionRule, Rule
from .results import BlockGraph, Explanation, LayerGradients, Observation, Pass

FRAMEWORKS = {
    "torch": ("torch",),
    "keras": ("keras", "tensorflow", "tf_keras"),
    "jax": ("jax", "jaxlib", "flax", "equinox"),
}
"""The packages that a framework's models and tensors come from. A Keras model on torch is a `torch.nn.Module`, one on
JAX goes to the side of JAX."""

BROUGHT = {"keras": ("h5py",)}
"""What comes with a framework, and its files import too."""

TITLES = {"torch": "PyTorch", "keras": "Keras", "jax": "JAX"}

_INSTEAD = {
    ("jax", "inspect.blocks"): "; ut.trace(model, x) shows the gradient at each module, and "
    "ut.derive.Network.parse('x1>n1 n1>n2') takes a graph that is written out"
}
CAPABILITIES = {
    "arrays": "conversion to NumPy",
    "explain": "explain",
    "explain.rules": "one forward pass for several rules",
    "inspect.layers": "a look at layers, which verdicts and Grad-CAM need,",
    "inspect.trace": "trace",
    "inspect.redirect": "redirect",
    "inspect.blocks": "derive.from_model",
    "inspect.derivatives": "a check of derivatives by autograd",
    "memory": "a look at a device's memory",
    "prepare": "prepare",
    "record": "record",
    "record.gradients": "value_and_grad, with which networks of JAX are recorded,",
    "texts": "explain_text",
    "zoo": "loading models by name",
}
"""Each capability's file or folder, and its name in messages."""


BEFORE, AS_IS = "before", "as is"
"""What a class target means where the model ends in a softmax or a sigmoid: the score before it, or what it returns."""


def positional(tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return tensors as the positional arguments of a call."""
    return tuple(tensors), {}


@dataclass(frozen=True)
class Request:
    """One explanation as the user asked for it, already checked as far as no framework is needed.

    Attributes:
        inputs: the tensors that the model is given, however deep in its arguments.
        target: None, class ids, "top:K", or a function of the output.
        output: the part of the output that holds the scores; None for the usual one.
        head: "before" or "as is".
        around: from a model to what is called in its place: itself, or a function of a layer's output.
        fill: from tensors in the places of `inputs` to the positional and keyword arguments of the model.
        structure: a text that differs where those arguments differ in more than the tensors.
        is_plain: the inputs are batches, whose first axes are as long.
        noun: what the inputs are, in messages; empty: "input 0" and so on.
        is_list: the inputs are those of a list that the model takes whole.
        memory: what a framework keeps for further requests of the same call of the user's.
        channel_axis: of inputs that are a layer's output, 1 or -1 where its modules tell.
    """

    model: Callable[..., Any]
    inputs: tuple[Any, ...]
    rule: ActivationRule | Rule | AttentionRule
    rule_name: str
    target: Any
    through: str
    activations: str
    training: bool
    output: Path | None = None
    head: str = BEFORE
    around: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda model: model
    fill: Callable[[Sequence[Any]], tuple[tuple[Any, ...], dict[str, Any]]] = positional
    structure: str = ""
    is_plain: bool = True
    noun: str = ""
    is_list: bool = False
    memory: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    channel_axis: int | None = None

    def bind(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """Return a model as a function of the tensors alone."""

        def call(*tensors: Any) -> Any:
            args, kwargs = self.fill(tensors)
            return self.around(model)(*args, **kwargs)

        return call

    def describe(self, i: int) -> str:
        """Name an input in a message."""
        return self.noun or f"input {i}"

    @property
    def is_inside(self) -> bool:
        """Whether the inputs are the output of a layer."""
        return bool(self.noun)

    @property
    def activation_rule(self) -> ActivationRule:
        """The rule of a way that reaches activations alone.

        Raises:
            RuleError: the rule is a table of more.
        """
        if isinstance(self.rule, Rule | AttentionRule):
            raise RuleError(
                f"rule {self.rule_name!r} is of more than activations, which through='graph' alone reaches, on "
                "PyTorch and JAX; here the rule is gradient, deconvnet, guided or a function (g, local) -> g"
            )
        return self.rule

    @property
    def batch(self) -> int | None:
        """The number of samples; None where only the output tells."""
        return len(self.inputs[0]) if self.is_plain and self.inputs[0].ndim else None


class Arrays(Protocol):
    """Tensors to and from NumPy, and the devices that they are on."""

    def to_numpy(self, tensor: Any) -> npt.NDArray[Any]:
        """Copy a tensor to NumPy; bfloat16, which NumPy lacks, becomes float32."""

    def like(self, array: npt.NDArray[Any], x: Any) -> Any:
        """Make an array a tensor of the dtype and on the device of `x`."""

    def channels_last(self) -> bool:
        """Whether images are `(B, H, W, C)`."""

    def batch(self, arrays: Sequence[npt.NDArray[Any]], device: str) -> Any:
        """Stack arrays `(C, H, W)` into a batch on a device, with the channels where the framework has them."""

    def device(self, name: str) -> str:
        """Return the device that a name means; "auto" is the fastest one there is. Raises InputError: not here."""

    def move(self, model: Any, device: str) -> None:
        """Move a network to a device."""


class Explainer(Protocol):
    """Maps under a rule."""

    def explain(self, request: Request) -> Explanation:
        """Explain the scores of one batch: one forward pass, and one backward pass for each target of a sample."""

    def scores(self, model: Callable[..., Any], x: Any, output: Path | None = None) -> npt.NDArray[Any]:
        """Return the model's scores as they are, `(B, classes)` float64."""

    def at_layer(self, request: Request, layer: str) -> list[tuple[ModelArguments, Request]]:
        """Return, for each call of a layer, its output as arguments, and the request to explain by them."""


class RulesExplainer(Protocol):
    """Several rules in one forward pass."""

    def can_share(self, requests: Sequence[Request]) -> bool:
        """Whether one forward pass serves requests that differ in their rule alone."""

    def explain_rules(self, requests: Sequence[Request]) -> Iterator[Explanation]:
        """Explain requests that `can_share`, in order."""


class Preparer(Protocol):
    """Copies of a network that do the same with less."""

    STEPS: tuple[str, ...]
    """What can be done to a copy, in order."""

    def prepared(self, model: Any, steps: Sequence[str], example: Any) -> Any:
        """Return a frozen copy with some steps taken. Raises InputError: one cannot be."""


class Memory(Protocol):
    """The memory of a device; None where it is not known."""

    def free(self, device: str) -> int | None:
        """Return how many bytes can still be allocated."""

    def peak(self, device: str) -> Callable[[], int] | None:
        """Begin to measure; what is returned tells how many bytes more were allocated since, at most."""


class Inspector(Protocol):
    """A network's scores and layers."""

    def channels_last(self, model: Any, x: Any) -> bool:
        """Whether a model takes images `(B, H, W, C)`, and `x` is such."""

    def scores(self, model: Callable[..., Any], x: Any, output: Path | None = None) -> npt.NDArray[Any]:
        """Return the model's scores, `(B, classes)`, before a softmax or sigmoid at its end."""

    def layers(self, model: Any, x: Any) -> list[str]:
        """List the modules that hold weights of their own and run, in the order in which they are first called."""

    def reinitialized(self, model: Any, layers: Sequence[str], seed: int) -> Any:
        """Return a copy in which the named layers are initialised anew; all other weights are shared."""

    def layer_gradients(
        self, request: Request, layers: Sequence[str], directions: npt.NDArray[Any] | None = None
    ) -> LayerGradients:
        """Explain, and return what the named layers returned and the gradients that flowed back to them."""


class Tracer(Protocol):
    """One pass, call by call."""

    def trace(self, model: Any, inputs: tuple[Any, ...], gradient: Any = None) -> Pass:
        """Return each module call's inputs, outputs and gradients."""


class Redirection(Protocol):
    """Modules whose gradients are changed from `__enter__` to `__exit__`."""

    @property
    def changed(self) -> Mapping[str, int]:
        """How many gradients each site's function was given."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None: ...


class Redirector(Protocol):
    """Gradients changed on their way back."""

    def redirected(self, model: Any, sites: Mapping[str, Callable[[Any], Any]]) -> Redirection:
        """Return the context in which each site's function changes the gradient there."""

    def zero(self, g: Any) -> Any:
        """Return zeros like `g`."""

    def clip(self, g: Any, norm: float) -> Any:
        """Return `g`, `(B, ...)`, each sample shortened to an ℓ2 norm of at most `norm`."""

    def noisy(self, std: float, seed: int) -> Callable[[Any], Any]:
        """Return a function that adds normal noise."""


class BlockReader(Protocol):
    """One pass as a graph of blocks."""

    def block_graph(self, model: Any, inputs: tuple[Any, ...], depth: int, target: Any) -> BlockGraph:
        """Return the blocks that a pass goes through, and the gradient that each edge carries."""


class Differentiator(Protocol):
    """Derivatives by autograd, with which those of `undertow.derive` are compared."""

    def gradients(
        self,
        order: Sequence[str],
        edges: Sequence[tuple[str, str]],
        values: Mapping[str, npt.NDArray[Any]],
        activation: str,
    ) -> dict[str, npt.NDArray[np.float64]]:
        """Return the derivatives of a network of neurons by every weight, bias, input and neuron."""

    def jvp(
        self,
        function: Callable[[Mapping[str, Any], Any], Any],
        values: Mapping[str, npt.NDArray[Any]],
        wrt: str,
        direction: npt.NDArray[Any],
    ) -> npt.NDArray[np.float64]:
        """Return the derivative of a function of matrices along a direction."""


@dataclass(frozen=True)
class NamedModule:
    """A module of a network: all its names, its kind, its classes and itself."""

    names: tuple[str, ...]
    kind: str
    types: tuple[str, ...]
    module: Any

    @property
    def name(self) -> str:
        """Its first name."""
        return self.names[0]


@dataclass(frozen=True)
class NamedParameter:
    """A parameter of a network: all its names and itself."""

    names: tuple[str, ...]
    parameter: Any

    @property
    def name(self) -> str:
        """Its first name."""
        return self.names[0]


class Transfer(Protocol):
    """Results on their way from a device to the host."""

    nbytes: int

    def wait(self) -> list[Observation]:
        """Wait for the copies, and return the observations with NumPy arrays in their states."""


class BatchProbe(Protocol):
    """Reads the sites of one batch from `__enter__` to `__exit__`.

    Attributes:
        observations: in order of arrival.
        order: the sites in the order in which they first gave an output.
        views: the sites whose output is a view, on which an in-place operation hides the gradient.
        unread: the sites whose output no measure reads, each with the reason.
        unscaled: float16 came out of autocast, and there is no scaler.
        scale: of the AMP scaler when the first gradient came; None without one.
        n_samples: how many there are, where a module told.
        inputs: how many samples the network may have been called with, where that is known.
    """

    n_samples: int | None
    inputs: set[int]
    observations: list[Observation]
    order: dict[str, None]
    views: set[str]
    unread: dict[str, str]
    unscaled: bool
    scale: Any

    @property
    def arrived(self) -> set[str]:
        """The sites at which a gradient has come."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None: ...

    def diagnosis_points(self, names: Sequence[str]) -> list[Any]:
        """Return what was seen for a diagnosis of the named sites."""

    def transfer(self, points: Sequence[Any], others: Sequence[Observation] = ()) -> Transfer:
        """Begin to copy what was observed, here and by others, to the host."""


class ParameterProbe(Protocol):
    """Reads the parameters of one batch: backward passes until `__exit__`, steps of the optimizers until `close`.

    Attributes:
        observations: in order of arrival.
        steps: a row for each group of parameters in each step of an optimizer.
    """

    observations: list[Observation]
    steps: list[dict[str, Any]]

    @property
    def arrived(self) -> bool:
        """Whether a gradient has come to any of them."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None: ...

    def close(self) -> None:
        """Watch the optimizers no longer."""


Objective = Callable[[Any, Sequence[int] | None], tuple[list[int], list[float]]]
"""From a batch and its labels, if it has any, to each sample's class and the score of that class."""


class Recorder(Protocol):
    """A network's modules and parameters, read batch by batch."""

    def named_modules(self, model: Any) -> list[NamedModule]:
        """List every module that can be a site, in the order of definition, each once."""

    def named_parameters(self, model: Any) -> list[NamedParameter]:
        """List every parameter that can be a site, in the order of definition, each once."""

    def optimizers_of(self, optimizer: Any) -> tuple[Any, ...]:
        """Return the optimizers in what a user gave as one or several. Raises InputError: something else is there."""

    def optimizer_groups(self, parameters: Mapping[str, Any], optimizers: Sequence[Any]) -> dict[str, Any]:
        """Return for each name the position of its optimizer and of its group there; None where it is in none."""

    def visits(self, model: Any, example: Any) -> dict[str, list[Any]]:
        """Run the network on an example; return the output shapes of each module that was called, in order."""

    def identity(self, model: Any) -> dict[str, Any]:
        """Return what tells a network from others: its class, structure, weights and precision."""

    def world(self) -> tuple[int, int]:
        """Return this process's rank and the number of processes."""

    def layouts(self, model: Any, given: Mapping[str, str]) -> Any:
        """Return the axes of all modules' outputs, for `new_probe`; `given` has letters for some of them."""

    def new_probe(
        self,
        modules: Mapping[str, Any],
        measures: Sequence[Measure],
        phases: frozenset[str],
        scaler: Any,
        watched: Any,
        layouts: Any = None,
        n_samples: int | None = None,
    ) -> BatchProbe:
        """Return a probe of modules; `watched` is the whole network where the batch is watched for a diagnosis.

        `n_samples` are as many as there are names, where there are any.
        """

    def new_parameter_probe(
        self, parameters: Mapping[str, Any], measures: Sequence[Measure], optimizers: Sequence[Any], scaler: Any
    ) -> ParameterProbe:
        """Return a probe of parameters for one batch and the steps that follow it."""

    def objective(self, model: Any, name: str) -> AbstractContextManager[Objective]:
        """Give what runs a batch forward and backward with a summed objective; the weights are frozen inside."""


class LossRecorder(Protocol):
    """Functions that return what passes through a network's sites, where no hook can sit in it."""

    def watching(self, model: Any, sites: Sequence[str], phases: frozenset[str], parameters: Sequence[str]) -> Any:
        """Return what is to be seen at sites, by their first names."""

    def value_and_grad(
        self, what: Any, function: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False
    ) -> Callable[..., tuple[Any, Any, Any]]:
        """Return a function of a loss's arguments to its value, its gradients, and what was seen."""


@overload
def capability(framework: str, name: Literal["arrays"]) -> Arrays: ...
@overload
def capability(framework: str, name: Literal["explain"]) -> Explainer: ...
@overload
def capability(framework: str, name: Literal["explain.rules"]) -> RulesExplainer: ...
@overload
def capability(framework: str, name: Literal["prepare"]) -> Preparer: ...
@overload
def capability(framework: str, name: Literal["memory"]) -> Memory: ...
@overload
def capability(framework: str, name: Literal["inspect.layers"]) -> Inspector: ...
@overload
def capability(framework: str, name: Literal["inspect.trace"]) -> Tracer: ...
@overload
def capability(framework: str, name: Literal["inspect.redirect"]) -> Redirector: ...
@overload
def capability(framework: str, name: Literal["inspect.blocks"]) -> BlockReader: ...
@overload
def capability(framework: str, name: Literal["inspect.derivatives"]) -> Differentiator: ...
@overload
def capability(framework: str, name: Literal["record"]) -> Recorder: ...
@overload
def capability(framework: str, name: Literal["record.gradients"]) -> LossRecorder: ...
@overload
def capability(framework: str, name: Literal["texts", "zoo"]) -> Any: ...
def capability(framework: str, name: str) -> Any:
    """Import what a framework can do.

    Args:
        framework: a key of `FRAMEWORKS`, as `framework_of` gives it.
        name: a key of `CAPABILITIES`.

    Raises:
        ModelError: the framework cannot do it yet.
        FrameworkError: the framework is not installed.
    """
    try:
        return importlib.import_module(f".{framework}.{name}", __package__)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing.startswith(f"{__package__}.{framework}"):
            instead = _INSTEAD.get((framework, name), "")
            raise ModelError(f"{CAPABILITIES[name]} is not there for {TITLES[framework]} yet{instead}") from error
        if missing not in (*FRAMEWORKS[framework], *BROUGHT.get(framework, ())):
            raise
        raise FrameworkError(f"{missing} is not installed; run: {install_command(framework)}") from error


def framework_of(value: Any) -> str | None:
    """Return the framework that a model or tensor belongs to; None where it belongs to none.

    >>> framework_of(np.zeros(1)) is None
    True
    """
    roots = roots_of(value)
    if "keras" in roots and "torch" not in roots and keras_backend() == "jax":
        return "jax"
    return next((name for name, packages in FRAMEWORKS.items() if roots.intersection(packages)), None)


def roots_of(value: Any) -> set[str]:
    """Return the packages that an object's class and its bases come from; of one of ours the framework it stands for.

    >>> roots_of(np.zeros(1)) == {"numpy", "builtins"}
    True
    """
    modules = [cls.__module__ for cls in type(value).__mro__]
    ours = [module.removeprefix(f"{__package__}.").partition(".")[0] for module in modules]
    return {*(module.partition(".")[0] for module in modules), *ours}


def keras_backend() -> str:
    """Return what Keras runs on here, "tensorflow", "torch" or "jax"; "" where it was not imported."""
    keras = sys.modules.get("keras")
    return "" if keras is None else str(keras.backend.backend())


def bound(model: Any) -> Any:
    """Return a model as what can be called: a pair of a Flax linen module and its variables is put together."""
    if type(model) is tuple and len(model) == 2 and hasattr(model[0], "bind") and framework_of(model[0]) == "jax":
        return model[0].bind(model[1])
    return model


def framework_of_input(x: Any, model: Any = None) -> str:
    """Return the framework that a tensor belongs to; that of the model for a NumPy array and a Keras model.

    Raises:
        InputError: it belongs to none that is read here, or the model to another.
        FrameworkError: Keras runs on JAX, say.
    """
    framework, of_model = framework_of(x), framework_of(model)
    if of_model == "keras" and "keras" in roots_of(model):
        refuse_backend(keras_backend())
    if framework is None and of_model in ("keras", "jax") and isinstance(x, np.ndarray):
        return of_model
    if framework is None or of_model not in (None, framework):
        raise InputError(
            f"x is {_title_of(x, framework)}, {_REMEDIES[of_model](_AS_NUMPY.get(framework, _numpy_of(x)))}"
        )
    return framework


def refuse_backend(name: str) -> None:
    """Refuse a Keras that does not run on TensorFlow, where that is needed.

    Raises:
        FrameworkError: it runs on JAX or on torch, whose models and tensors go to their side, or on anything else.
    """
    if name == "torch":
        raise FrameworkError("keras runs on torch here: pass x as a torch tensor, as in torch.from_numpy(x)")
    if name != "tensorflow":
        remedy = "set KERAS_BACKEND=tensorflow before keras is imported"
        verbs = "ut.explain, ut.trust, ut.trace, ut.redirect and ut.record"
        there = f"; {verbs} take the model itself" if name == "jax" else ""
        raise FrameworkError(f"keras runs on {name} here, where this is not supported; {remedy}{there}")


_AS_NUMPY: dict[str | None, str] = {
    "torch": "x.numpy(force=True)",
    "keras": "x.numpy()",
    "jax": "numpy.array(x)",
}
_TITLES_OF_TENSORS = {
    "torch": "a PyTorch tensor",
    "keras": "a TensorFlow tensor",
    "numpy": "a NumPy array",
    "jax": "a JAX array",
    "mlx": "an MLX array",
    "cupy": "a CuPy array",
}
_REMEDIES: dict[str | None, Callable[[str], str]] = {
    None: lambda array: (
        f"not a torch tensor or a tuple of them; use torch.from_numpy({array}), or jax.numpy.asarray({array}) where "
        "the model is of JAX"
    ),
    "torch": lambda array: (
        f"and the model takes a torch tensor; use torch.from_numpy({array}), axes in the model's order"
    ),
    "keras": lambda array: f"and the model is of Keras on TensorFlow; use {array}, axes in the model's order",
    "jax": lambda array: f"and the model is of JAX; use jax.numpy.asarray({array}), axes in the model's order",
}


def _numpy_of(x: Any) -> str:
    return "x" if isinstance(x, np.ndarray) else "numpy.array(x)"


def _title_of(x: Any, framework: str | None) -> str:
    root = type(x).__module__.partition(".")[0]
    return _TITLES_OF_TENSORS.get(framework or root, f"a {type(x).__name__}")


def framework_of_model(model: Any) -> str:
    """Return the framework that a network belongs to; torch for a plain function."""
    return framework_of(model) or "torch"


def as_numpy(value: Any) -> npt.NDArray[Any]:
    """Copy a tensor of any framework, or an array of any library, to NumPy. Raises InputError: it is none."""
    framework = framework_of(value)
    if framework is not None:
        return capability(framework, "arrays").to_numpy(value)
    if not is_tensor(value):
        raise InputError(f"a {type(value).__name__} is no array; pass a tensor, or a NumPy array")
    return np.array(value)
