"""Which operations the equations of one call are: one node each, or several where an operation is written out.

The same as `undertow.frameworks.torch.explain.recognition` finds in an autograd graph. In a jaxpr every norm is written
out, so its kind is `spread`: its signal by a function of sums alone that ends in a root.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from jax.extend.core import jaxprs_in_params

from ..graph import BODIES, CUSTOM, JaxprNode, JaxprValue, graph_of, uniform
from ..internals import body_of_custom, function_name, is_of_jax
from ..patterns import JaxKind
from .kinds import ACTIVATIONS, AFFINE, COPIES, ELEMENTWISE, GATES, PICKS, REDUCTIONS, SMOOTH, SUMS, VIEWS
from .layers import behind_layer, is_nonnegative
from .steps import JaxprStep, JaxprSteps

Exit = tuple[JaxprNode, int]
"""A node and one of its operands."""

_PASSING = VIEWS | COPIES
_PROPORTIONAL = frozenset(("max", "select_n", "mul", "gt", "lt", "ge", "le", *CUSTOM, *COPIES, *VIEWS))
_LONGEST = 64  # steps of one activation written out


@dataclass(frozen=True, eq=False)
class FoundOperation:
    """One operation.

    Attributes:
        kind: one of `undertow.tables.KINDS`.
        name: for messages.
        nodes: in the order of execution; the last gives the result.
        operands: for each operand on the way, by which operands of the nodes it enters.
        gate: which of two factors something computed as a weight.
        is_proportional: f(x) / x is the derivative itself, as of a ReLU.
        has_negative_input, has_negative_output: of a layer; see `undertow.tables.Operation`.
    """

    kind: str
    name: str
    nodes: tuple[JaxprNode, ...]
    operands: tuple[tuple[Exit, ...], ...]
    gate: int | None = None
    is_proportional: bool = False
    has_negative_input: bool = True
    has_negative_output: bool = True

    @property
    def is_layer(self) -> bool:
        """Whether it has constant weights."""
        return self.kind in ("conv", "linear")


@dataclass
class RecognizedOperations:
    """The operations on the way, scores first, and the nodes that are none that is known.

    Attributes:
        bodies: loops, branches and rematerialised blocks.
        unknown: names of nodes that pass their gradient for want of a better rule, with how often.
        opaque: of a user's own functions with a derivative of their own.
    """

    operations: list[FoundOperation] = field(default_factory=list)
    bodies: list[JaxprNode] = field(default_factory=list)
    unknown: Counter[str] = field(default_factory=Counter)
    opaque: Counter[str] = field(default_factory=Counter)


def recognize(steps: JaxprSteps) -> RecognizedOperations:
    """Return the operations among all steps on the way."""
    found, claimed = RecognizedOperations(), set[JaxprStep]()
    for step in reversed(steps.all):
        if step in claimed:
            continue
        operation, inner = _operation(step, steps)
        if operation is not None:
            claimed |= inner
            found.operations.append(operation)
        elif step.name in BODIES:
            found.bodies.append(step.root)
        elif step.name in CUSTOM:
            body = body_of_custom(step.root.eqn).jaxpr
            (found.unknown if is_of_jax(body) else found.opaque)[function_name(body)] += 1
        elif not _passes(step):
            found.unknown[step.name] += 1
    return found


def _passes(step: JaxprStep) -> bool:
    """Whether a step only hands on, adds or scales what it is given, so that its gradient is right under any rule."""
    if step.name in _PASSING | PICKS | SUMS:
        return True
    if step.name in ("max", "min"):
        return len(step.places) == 2
    if step.name in ("mul", "div", "dot_general"):  # by a constant
        return len(step.places) == 1 and (step.name != "div" or step.places == (0,))
    return step.name == "integer_pow" and step.root.eqn.params["y"] == 1


def _single(kind: str, step: JaxprStep, place: int | None = None, is_proportional: bool = False) -> FoundOperation:
    """Return an operation of one node, with the operand at a place, or with two."""
    places = step.places if place is None else (place,)
    return FoundOperation(
        kind, step.name, step.nodes, tuple(((step.root, i),) for i in places), is_proportional=is_proportional
    )


def _operation(step: JaxprStep, steps: JaxprSteps) -> tuple[FoundOperation | None, set[JaxprStep]]:
    """Return the operation that ends in a step, and the steps that are within it; None for no operation."""
    name, places, node = step.name, step.places, step.root
    if step.match is not None:
        kind = "relu" if step.match.kind is JaxKind.RELU else "smooth"
        exits = tuple(_exits(step.nodes, step.match.x))
        is_proportional = kind == "relu" and all(map(_is_proportional, step.nodes))
        return FoundOperation(kind, name, step.nodes, (exits,), is_proportional=is_proportional), set()
    if step.output.aval.dtype.kind == "c" or (step.inputs and step.inputs[0].aval.dtype.kind == "c"):
        return _of_complex(step, steps), set()
    if name == "abs":
        return _single("relu", step, is_proportional=True), set()
    if steps.is_softmax_by_logarithm(step):
        return _single("softmax", step), set()
    if name in SMOOTH:
        return (None if name == "integer_pow" and node.eqn.params["y"] == 1 else _single("smooth", step)), set()
    if name in CUSTOM:
        return (_single("smooth", step) if _is_elementwise_of_jax(step) else None), set()
    if name in ("max", "min") and len(places) == 1:
        return _single("smooth", step), set()
    if name == "clamp":  # bounds, value, bounds
        return (_single("smooth", step) if places == (1,) else None), set()
    if name == "pow":
        return (_single("smooth", step) if len(places) == 1 else None), set()
    if name == "reduce_window_max":
        return _single("pool", step), set()
    if name == "dot_general":
        gate = _gate(step.inputs, steps) if len(places) == 2 else None
        return (_with_gate(_single("matmul", step), gate) if len(places) == 2 else _layer("linear", step, steps)), set()
    if name == "conv_general_dilated":
        if places == (0,) and node.eqn.params["batch_group_count"] == 1:
            return _layer("conv", step, steps), set()
        return (_single("matmul", step) if len(places) == 2 else None), set()
    if name == "div" and places == (1,):  # a constant by x
        return _single("smooth", step), set()
    if name in ("mul", "div") and len(places) == 2:
        return _written_out(step, steps)
    if name in ("sub", "add") and len(places) == 2:
        softmax = _log_softmax(step, steps) if name == "sub" else None
        return softmax if softmax is not None else (_single("add", step), set())
    return None, set()


def _layer(kind: str, step: JaxprStep, steps: JaxprSteps) -> FoundOperation:
    """Return a product with constant weights, with the bias and the batch norm that alone read it."""
    nodes = (step.root, *behind_layer(step, steps))
    reader = steps.reader.get(nodes[-1].outputs[0])
    is_closed = reader is not None and steps.readers[nodes[-1].outputs[0]] == 1 and _is_closing(reader)
    return FoundOperation(
        kind,
        step.name,
        nodes,
        (((step.root, step.places[0]),),),
        has_negative_input=not is_nonnegative(step.inputs[0]),
        has_negative_output=not is_closed,
    )


def _is_closing(step: JaxprStep) -> bool:
    """Whether a step is a ReLU, which passes nothing where it is given negative numbers."""
    is_relu = step.match is not None and step.match.kind is JaxKind.RELU
    return is_relu and all(map(_is_proportional, step.nodes)) and is_nonnegative(step.output)


def _of_complex(step: JaxprStep, steps: JaxprSteps) -> FoundOperation | None:
    """Return what an operation of complex numbers is, such as a rotation: a product, or nothing that is known."""
    if len(step.places) < 2 or step.name not in ("mul", "dot_general"):
        return None
    return _with_gate(_single("product" if step.name == "mul" else "matmul", step), _gate(step.inputs, steps))


def _with_gate(operation: FoundOperation, gate: int | None) -> FoundOperation:
    return FoundOperation(operation.kind, operation.name, operation.nodes, operation.operands, gate)


def element(step: JaxprStep) -> FoundOperation:
    """Return a step with one input as an operation, whatever it does."""
    exits = tuple(_exits(step.nodes, step.inputs[0]))
    return FoundOperation("smooth", step.name, step.nodes, (exits,))


def _exits(nodes: Iterable[JaxprNode], value: JaxprValue) -> Iterator[Exit]:
    """Yield where a value enters nodes."""
    return ((node, i) for node in nodes for i, operand in enumerate(node.inputs) if operand is value)


def _is_proportional(node: JaxprNode) -> bool:
    if node.name not in _PROPORTIONAL:
        return False
    return node.name not in CUSTOM or all(map(_is_proportional, graph_of(body_of_custom(node.eqn)).nodes))


def _is_elementwise_of_jax(step: JaxprStep) -> bool:
    """Whether a function of JAX with a derivative of its own is elementwise, of one operand."""
    body = body_of_custom(step.root.eqn)
    if not is_of_jax(body.jaxpr) or len(step.inputs) != 1 or len(step.root.outputs) != 1:
        return False
    shape = step.output.aval.shape
    nodes = graph_of(body).nodes
    is_known = all(node.name in ELEMENTWISE | CUSTOM or not node.outputs[0].is_float for node in nodes)
    return is_known and step.inputs[0].aval.shape == shape and not any(_has_body(node) for node in nodes)


def _has_body(node: JaxprNode) -> bool:
    return node.name not in CUSTOM and any(True for _ in jaxprs_in_params(node.eqn.params))


def _gate(factors: Collection[JaxprValue], steps: JaxprSteps) -> int | None:
    """Return which of two factors is a weight: what a softmax or sigmoid gave, else what an activation gave."""
    for is_weight in (_only_softmax, _from_gate, _from_activation):
        are = [is_weight(value, steps) for value in factors]
        if are.count(True) == 1:
            return are.index(True)
    return None


def _only_softmax(value: JaxprValue, steps: JaxprSteps) -> bool:
    """Whether a factor is a function of softmaxes alone, as attention weights that heads mix."""
    return value in steps.of_softmax


def _from_gate(value: JaxprValue, steps: JaxprSteps) -> bool:
    value = steps.through(value, _PASSING | AFFINE)
    step = steps.maker.get(value)
    return step is not None and (step.name in GATES or steps.is_softmax(step))


def _from_activation(value: JaxprValue, steps: JaxprSteps) -> bool:
    step = steps.maker.get(steps.through(value, _PASSING | AFFINE))
    if step is None:
        return False
    return step.name in ACTIVATIONS or (step.name == "mul" and _activation(step, steps) is not None)


def _written_out(step: JaxprStep, steps: JaxprSteps) -> tuple[FoundOperation | None, set[JaxprStep]]:
    """Return what a product or a quotient of two operands on the way is."""
    region = _activation(step, steps)
    if region is not None:
        return _group("smooth", step, *region, steps), region[1]
    first, second = step.inputs
    if step.name == "div":
        if steps.is_softmax(step):
            top = steps.maker[steps.through(first, _PASSING)]
            inner = {top, *steps.until(second, "exp"), *steps.until(first, "exp")}
            if _own(inner, step, steps) != inner:
                return None, set()
            return _group("softmax", step, top.inputs[0], inner, steps), inner
        inner = _statistic(second, steps)
        return (_single("spread", step) if inner else None), _own(inner, step, steps)
    for place, statistic in ((0, second), (1, first)):
        inner = _statistic(statistic, steps, inverse=True)
        if inner:
            operands = ((step.root, place),), ((step.root, 1 - place),)
            return FoundOperation("spread", step.name, step.nodes, operands), _own(inner, step, steps)
    return _with_gate(_single("product", step), _gate(step.inputs, steps)), set()


def _log_softmax(step: JaxprStep, steps: JaxprSteps) -> tuple[FoundOperation, set[JaxprStep]] | None:
    """Return x - log(sum(exp(x))) as one operation."""
    found = steps.log_softmax(step)
    if found is None or _own(found[1], step, steps) != found[1]:
        return None
    return _group("softmax", step, *found, steps), found[1]


def _group(kind: str, step: JaxprStep, x: JaxprValue, inner: set[JaxprStep], steps: JaxprSteps) -> FoundOperation:
    """Return an operation of several steps of one tensor."""
    nodes = tuple(sorted((n for s in (step, *inner) for n in s.nodes), key=steps.position.__getitem__))
    return FoundOperation(kind, step.name, nodes, (tuple(_exits(nodes, x)),))


def _activation(step: JaxprStep, steps: JaxprSteps) -> tuple[JaxprValue, set[JaxprStep]] | None:
    """Return the one tensor of which a step is an elementwise function, and the steps within; None for any other.

    The nearest such tensor: the latest among the operands is taken apart, until all of them come from one.
    """
    inner, frontier, shape = {step}, set(step.inputs), step.output.aval.shape
    for _ in range(_LONGEST):
        if len(frontier) == 1:
            break
        latest = max(frontier, key=lambda value: steps.order.get(value, -1))
        maker = steps.maker.get(latest)
        if maker is None or not (maker.match or maker.name in ELEMENTWISE) or latest.aval.shape != shape:
            return None
        inner.add(maker)
        frontier = (frontier - {latest}) | set(maker.inputs)
    if len(frontier) != 1:
        return None
    (x,) = frontier
    is_whole = x.aval.shape == shape and _own(inner - {step}, step, steps) == inner - {step}
    return (x, inner - {step}) if is_whole else None


def _own(inner: set[JaxprStep], step: JaxprStep, steps: JaxprSteps) -> set[JaxprStep]:
    """Return those of some steps that only each other and one more step read: what else is read counts for itself."""
    kept = set(inner)
    while True:
        reads = Counter(value for s in (step, *kept) for value in s.inputs)
        shared = {s for s in kept if any(steps.readers[value] != reads[value] for value in s.root.outputs)}
        if not shared:
            return kept
        kept -= shared


def _statistic(value: JaxprValue, steps: JaxprSteps, inverse: bool = False) -> set[JaxprStep]:
    """Return the steps between a factor and the sums over an axis that it is a function of; none for any other.

    Args:
        inverse: only of a factor that is one over something, as in a product.
    """
    inner, remaining, inverted = set[JaxprStep](), [value], not inverse
    while remaining:
        step = steps.maker.get(remaining.pop())
        if step is None:
            return set()
        inner.add(step)
        if step.name in REDUCTIONS:
            behind = steps.maker.get(step.inputs[0])
            inner |= (
                {behind} if behind is not None and behind.name in ("square", "integer_pow", "abs", "mul") else set()
            )
            continue
        is_known = step.match is not None or step.name in ELEMENTWISE | VIEWS
        inverted |= _is_inverse(step)
        if not is_known or not step.inputs or (len(step.inputs) > 1 and not inverted):
            return set()
        remaining += step.inputs
    return inner if inverted else set()


def _is_inverse(step: JaxprStep) -> bool:
    """Whether a step is one over something."""
    if step.name in ("integer_pow", "pow"):
        exponent = step.root.eqn.params["y"] if step.name == "integer_pow" else uniform(step.root.inputs[1])
        return exponent is not None and exponent < 0
    return step.name == "rsqrt" or (step.name == "div" and step.places == (1,))
