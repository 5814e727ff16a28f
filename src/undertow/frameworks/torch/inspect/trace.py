"""The inside of one pass: what each module call read and wrote, forward and backward.

The pass is watched by hooks that live as long as its forward, and act in this thread alone. The gradient at each output
is read at its edge of the graph, so a successor that works in place does not matter. Then each call is run once more,
alone, on what it was given, and differentiated: that is the gradient by way of this call, whoever else reads its
inputs or shares its parameters.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ....errors import InputError, ModelError
from ...results import Call, Checked, Difference, Pass
from ..calls import module_of, uncompiled
from .formulas import TOLERANCE, compared
from .functions import checked, custom, noted
from .watch import RngAndBuffers, Seen, Watch, state_restored, tensors_in, watched


def trace(model: Any, inputs: tuple[Any, ...], gradient: Any = None) -> Pass:
    """Look inside one pass of a network; see `undertow.trace`.

    Raises:
        InputError, ModelError: as `undertow.trace` says.
    """
    network, sources = uncompiled(model), _sources(inputs)
    module = module_of(network)
    if module is None or isinstance(module, torch.jit.ScriptModule):
        raise InputError(f"model is a {type(model).__name__}; trace looks at the calls of an nn.Module's parts")
    with state_restored(module, sources) as start:
        with Watch(module) as watch:
            output = _forward(network, sources)
        outputs = [t for t in tensors_in(output) if t.requires_grad]
        if not outputs:
            raise InputError("the output depends on nothing by any gradient (detached, frozen, or made under no_grad)")
        if watch.separated:
            _refuse_changed(network, sources, output, start)
        kept = [call for call in watch.calls if call.is_kept]
        _backward(outputs, _at_output(outputs, gradient), kept)
        functions = _functions(network, module, sources, outputs, start)
        used = {id(parameter) for call in kept for parameter in _own(call).values()}
        return Pass(
            calls=tuple(_told(call) for call in kept),
            functions=tuple(functions),
            unreached=tuple(name for name, part in watched(module) if _is_unreached(part, used)),
        )


def _sources(inputs: tuple[Any, ...]) -> list[Tensor]:
    """Return what to differentiate by: leaves of the inputs' values; integers as they are."""
    for place, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            raise InputError(f"input {place} is a {type(x).__name__}, not a torch tensor")
    return [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]


def _forward(network: Callable[..., Any], sources: list[Tensor]) -> Any:
    try:
        return network(*(source.clone() for source in sources))  # copies: a network may overwrite its input
    except Exception as error:
        error.add_note(f"while the model ran on an input of shape {', '.join(str(tuple(s.shape)) for s in sources)}")
        raise


def _at_output(outputs: list[Tensor], gradient: Any) -> list[Tensor]:
    """Return the gradient at each output: ones where none is given.

    Raises:
        InputError: what was given does not fit the outputs.
    """
    if gradient is None:
        return [torch.ones_like(output) for output in outputs]
    given = list(gradient) if isinstance(gradient, tuple) else [gradient]
    if len(given) != len(outputs):
        raise InputError(f"gradient has {len(given)} part(s) for {len(outputs)} output(s); pass a tuple, one for each")
    return [_fitting(g, output) for g, output in zip(given, outputs, strict=True)]


def _fitting(gradient: Any, output: Tensor) -> Tensor:
    try:
        g = torch.as_tensor(gradient).detach().to(output)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"gradient is a {type(gradient).__name__}, not numbers of shape {tuple(output.shape)}"
        ) from error
    if g.shape != output.shape:
        raise InputError(f"gradient has shape {tuple(g.shape)} where the output has {tuple(output.shape)}")
    return g


def _is_unreached(module: nn.Module, used: set[int]) -> bool:
    own = [id(parameter) for parameter in module.parameters(recurse=False)]
    return bool(own) and used.isdisjoint(own)


def _refuse_changed(network: Callable[..., Any], sources: list[Tensor], output: Any, start: RngAndBuffers) -> None:
    """Refuse a network for which copies of its views made a difference.

    Raises:
        ModelError: a module overwrites a view, and something else reads what lies under it.
    """
    with start.restored():
        again = _forward(network, sources)
    if not all(_alike(a, b) for a, b in zip(tensors_in(again), tensors_in(output), strict=True)):
        raise ModelError(
            "the model overwrites a view or an input that it reads again, or gives other values each time it runs; "
            "write inplace=False there"
        )


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = TOLERANCE.get(a.dtype, 1e-2)
    return torch.allclose(a.detach(), b.detach(), rtol=tolerance, atol=tolerance * _largest(b), equal_nan=True)


def _largest(t: Tensor) -> float:
    finite = t.detach()[t.detach().isfinite()]
    return float(finite.abs().amax()) if finite.numel() else 0.0


def _backward(outputs: list[Tensor], gradients: list[Tensor], calls: list[Seen]) -> None:
    """Give each call the gradients at its outputs, in one backward pass."""
    edges = [edge for call in calls for edge in call.edges if edge is not None]
    found = iter(torch.autograd.grad(outputs, edges, gradients, retain_graph=True, allow_unused=True) if edges else ())
    for call in calls:
        call.gradients = [None if edge is None else next(found) for edge in call.edges]


def _told(call: Seen) -> Call:
    own = _own(call)
    by_input, by_parameter, note = _by_way_of(call, own)
    formula: dict[str, Difference] = {}
    if by_input and call.gradients and call.gradients[0] is not None and call.gradients[0].dtype in TOLERANCE:
        found = {"input": by_input[0], **by_parameter}
        formula = compared(call.module, call.arguments.tensors[0], call.gradients[0], found)
    return Call(
        name=call.name,
        kind=type(call.module).__name__,
        call=call.number,
        inputs=tuple(call.arguments.tensors),
        outputs=tuple(call.outputs),
        input_gradients=tuple(by_input),
        output_gradients=tuple(None if g is None else g.detach() for g in call.gradients),
        parameters={name: parameter.detach().clone() for name, parameter in own.items()},
        parameter_gradients=by_parameter,
        formula=formula,
        note=note,
    )


def _own(call: Seen) -> dict[str, nn.Parameter]:
    """Return the parameters that belong to a call: all below it, unless other modules were called inside."""
    return dict(call.module.named_parameters(recurse=not call.inner))


def _by_way_of(call: Seen, own: dict[str, nn.Parameter]) -> tuple[list[Tensor | None], dict[str, Tensor | None], str]:
    """Run a call again, alone, and return the gradients by its inputs and its parameters that come of it."""
    nothing: tuple[list[Tensor | None], dict[str, Tensor | None]]
    nothing = [None] * len(call.arguments.tensors), dict.fromkeys(own)
    if all(edge is None for edge in call.edges):
        return *nothing, "its output carries no gradient (made under no_grad, detached, or all before it is frozen)"
    if all(g is None for g in call.gradients):
        return *nothing, "the objective does not depend on its output"
    leaves = [t.detach().requires_grad_(w) for t, w in zip(call.arguments.tensors, call.arguments.wanted, strict=True)]
    with call.state.restored():
        args, kwargs = call.arguments.filled([leaf.clone() for leaf in leaves])
        made = tensors_in(call.module.forward(*args, **kwargs))
    if len(made) != len(call.outputs) or not all(map(_alike, made, call.outputs)):
        return *nothing, "run again, alone, it gave other values, so its own gradients cannot be told"
    pairs = [(t, g) for t, g in zip(made, call.gradients, strict=True) if g is not None]
    wanted = {place: leaf for place, leaf in enumerate(leaves) if leaf.requires_grad}
    free = {name: parameter for name, parameter in own.items() if parameter.requires_grad}
    found = torch.autograd.grad(
        [t for t, _ in pairs],
        [*wanted.values(), *free.values()],
        [g for _, g in pairs],
        retain_graph=True,  # a weight that a hook made (weight_norm) has a graph from the pass itself
        allow_unused=True,
    )
    by_input = dict(zip(wanted, found[: len(wanted)], strict=True))
    by_parameter = dict(zip(free, found[len(wanted) :], strict=True))
    return [by_input.get(i) for i in range(len(leaves))], {name: by_parameter.get(name) for name in own}, ""


def _functions(
    network: Callable[..., Any], module: nn.Module, sources: list[Tensor], outputs: list[Tensor], start: RngAndBuffers
) -> list[Checked]:
    """Check the custom autograd functions of the pass, each call of each, if there are any."""
    classes = custom(outputs)
    if not classes:
        return []
    with start.restored(), Watch(module) as watch, noted(classes, watch.place) as calls:
        _forward(network, sources)
    return [checked(call) for call in calls]
