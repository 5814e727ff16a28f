"""What a framework returns about one pass: plain data, the same for every framework."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from ..display import Part, ShownFields, ShownItem, ShownTable, shape_of

EQUAL, DIFFERS, NO_FORMULA = "equal", "differs", "none"
END = "E"
CORRECT, WRONG, UNCHECKED = "correct", "wrong", "not checked"


@dataclass
class RewiringStats:
    """Counts of what a rule met between the scores and the inputs.

    Attributes:
        rewired: activation calls that the rule acted on.
        switches: max-pooling calls.
        skipped: activation calls that the rule left as they are, by the name of their node.
        opaque: calls of the user's own autograd functions, by name.
    """

    rewired: int = 0
    switches: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    opaque: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Explanation(ShownFields):
    """One explanation as a framework gives it.

    Attributes:
        maps: for each input its map, or None where it has no gradient.
        targets: class ids, `(B,)` or `(B, K)`; None where the target was a function.
        scores: the explained outputs, shape of `targets`.
        stats: counts of what the rule met.
        channels_last: images are `(B, H, W, C)`, not `(B, C, H, W)`.
        acting: random operations and batch norms in training that acted in the forward pass, by name.
        head: the softmax or sigmoid that the model ends in, by name; "" where it does not, or the target is a function.
        completeness: of integrated gradients, see `Attribution.completeness`.
        channel_axis: at a layer's output, 1 or -1 where the layer's modules tell.
    """

    maps: tuple[Any, ...]
    targets: Any
    scores: Any
    stats: RewiringStats
    channels_last: bool = False
    acting: dict[str, int] = field(default_factory=dict)
    head: str = ""
    completeness: Any = None
    channel_axis: int | None = None


@dataclass(frozen=True, repr=False)
class LayerGradients(ShownFields):
    """The outputs of some layers in one pass, and the gradients there, as NumPy, by the layer's name.

    Attributes:
        explanation: of the pass itself, as `explain` returns it, without maps.
        values: each layer's output, `(B, ...)`; of a layer's second call under `layer@1`.
        gradients: the gradient at each layer's output under the rule, `(B, K, ...)`, for K targets or directions.
        at_input: the gradient at the first floating-point input, `(B, K, ...)`.
        channel_axes: 1 or -1, where a layer's output has its channels; None where its module does not tell.
        reached: which of the inputs each layer's output depends on.
    """

    explanation: Explanation
    values: dict[str, npt.NDArray[Any]]
    gradients: dict[str, npt.NDArray[Any]]
    at_input: npt.NDArray[Any]
    channel_axes: dict[str, int | None]
    reached: dict[str, frozenset[int]]


@dataclass(frozen=True, slots=True)
class TensorKey:
    """Which tensor was observed.

    Attributes:
        site: the module's or the parameter's dotted name.
        call: how often the module had been called before in this batch, or the parameter been in an optimizer's step.
        output: the tensor's position in the output: "" for one alone, "0", "1.hidden".
        phase: "forward" or "backward"; of a parameter "gradient", "accumulated", "weight" or "update".
    """

    site: str
    call: int
    output: str
    phase: str


@dataclass(slots=True)
class Observation:
    """One tensor as the measures saw it, on its way from a hook to the writer.

    Attributes:
        key: which tensor.
        repeat: how often a gradient had come to it before in this batch.
        dtype: its own, such as "float32".
        size: how many rows a measure of samples has of it.
        states: of each measure, its state: arrays on the tensor's device, NumPy's once they are on the host.
        sampled: whether those rows are samples; those of a parameter are not.
        certain: whether the module or the user says so; else the first axis is taken for the samples'.
        axes: a letter for each axis of the tensor: b the samples, c the channels, - any other.
        run: how often the whole network had been called before in this batch.
        first: the place of its first row among the batch's samples; -1 where its rows are none of them.
    """

    key: TensorKey
    repeat: int
    dtype: str
    size: int
    states: list[dict[str, Any]]
    sampled: bool = True
    certain: bool = False
    axes: str = ""
    run: int = 0
    first: int = 0


class HostObservations:
    """Observations that are on the host already."""

    def __init__(self, observations: list[Observation]) -> None:
        self._observations = observations
        states = (state for observation in observations for state in observation.states)
        self.nbytes = sum(getattr(array, "nbytes", 8) for state in states for array in state.values())

    def wait(self) -> list[Observation]:
        """Return the observations; there is no copy to wait for."""
        return self._observations


@dataclass(frozen=True)
class Difference:
    """How far a gradient lies from the one that a closed formula gives.

    Attributes:
        largest: the largest absolute difference of an element, in the gradient's own unit.
        allowed: the largest difference that rounding in the pass's precision can explain.

    >>> Difference(largest=0.5, allowed=1e-5).equal
    False
    """

    largest: float
    allowed: float

    @property
    def equal(self) -> bool:
        """Whether rounding explains the difference."""
        return self.largest <= self.allowed


@dataclass(frozen=True, eq=False, repr=False)
class Call(ShownItem):
    """One call of one module in one pass. Tensors are the framework's, detached; a gradient that is missing is None.

    Attributes:
        name: the module's dotted name; empty for the network itself.
        kind: its class.
        call: how often it had been called before in this pass: 0, 1, ...
        inputs: the tensors it was given, before it could overwrite them; one passed twice is listed once.
        outputs: the tensors it returned, before a successor could overwrite them.
        input_gradients: of the objective by each input, by way of this call alone ("backward in").
        output_gradients: of the objective by each output, through everything that reads it.
        parameters: the values of its parameters, by name.
        parameter_gradients: of the objective by each parameter, by way of this call alone; None where it is frozen.
        formula: how far each gradient lies from its closed formula, where there is one: "input", "weight", "bias".
        note: why gradients are missing; empty where none is.
    """

    name: str
    kind: str
    call: int
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    input_gradients: tuple[Any, ...]
    output_gradients: tuple[Any, ...]
    parameters: Mapping[str, Any]
    parameter_gradients: Mapping[str, Any]
    formula: Mapping[str, Difference] = field(default_factory=dict)
    note: str = ""

    @property
    def verdict(self) -> str:
        """ "equal" or "differs" for the closed formulas of all its gradients; "none" where there is none."""
        if not self.formula:
            return NO_FORMULA
        return EQUAL if all(difference.equal for difference in self.formula.values()) else DIFFERS

    @property
    def tensors(self) -> dict[str, Any]:
        """The tensors by what they are, such as "input", "gradient by output" and "gradient by weight"."""
        groups = {
            "input": self.inputs,
            "output": self.outputs,
            "gradient by output": self.output_gradients,
            "gradient by input": self.input_gradients,
        }
        by_name = {
            name if len(tensors) == 1 else f"{name} {i}": tensor
            for name, tensors in groups.items()
            for i, tensor in enumerate(tensors)
        }
        return by_name | {f"gradient by {name}": g for name, g in self.parameter_gradients.items()}

    def _shown(self) -> Iterator[Part]:
        formula = "no closed formula" if self.verdict == NO_FORMULA else f"closed formula: {self.verdict}"
        yield f"Call {self.call} of {self.name or '(model)'}, {self.kind}; {formula}{'; ' * bool(self.note)}{self.note}"
        cells = [(name, "-" if tensor is None else shape_of(tensor)) for name, tensor in self.tensors.items()]
        yield ShownTable(("tensor", "shape"), cells, len(cells))


@dataclass(frozen=True)
class Checked:
    """Whether the backward of a user's own autograd function is the derivative of its forward.

    Attributes:
        function: the class's name.
        name, call: the innermost module call that it ran in.
        status: "correct", "wrong" or "not checked".
        backward, differences: the derivative along one random direction, by its backward and by central differences;
            of the direction in which they differed most. NaN where it was not checked.
        reason: why it was not checked, or which of its arguments is wrong.
    """

    function: str
    name: str
    call: int
    status: str
    backward: float = float("nan")
    differences: float = float("nan")
    reason: str = ""


@dataclass(frozen=True, repr=False)
class Pass(ShownFields):
    """One pass.

    Attributes:
        calls: in the order in which they began.
        functions: the user's own autograd functions in the graph, one row for each call.
        unreached: modules with parameters that were not called.
    """

    calls: tuple[Call, ...]
    functions: tuple[Checked, ...]
    unreached: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """One module call, or one operation between several of them.

    Attributes:
        name: dotted; with "#0", "#1", ... for a module called several times; an operation's after the module around it.
        kind: the module's class, or the operation.
        gradient: ℓ2 norm of the gradient that its readers send to its outputs.
        difference: between what all readers send and autograd's total there, relative to the largest absolute value.
    """

    name: str
    kind: str
    gradient: float
    difference: float


@dataclass(frozen=True)
class Carried:
    """The gradient that one block sends back to another that it reads.

    Attributes:
        source: the block that is read.
        target: its reader, from which the gradient comes; "E" for the objective.
        norm: ℓ2 norm of the gradient that the reader sends to the source's outputs.
    """

    source: str
    target: str
    norm: float


@dataclass(frozen=True, repr=False)
class BlockGraph(ShownFields):
    """One pass as blocks, in order of execution, and edges.

    Attributes:
        blocks: the inputs first.
        edges: in the order of their sources, then of their targets.
        passed_on: calls that returned their input as it was.
    """

    blocks: tuple[Block, ...]
    edges: tuple[Carried, ...]
    passed_on: tuple[str, ...] = ()
