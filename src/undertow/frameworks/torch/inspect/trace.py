"""One pass, call by call: each module call's inputs, outputs and gradients.

Hooks record the calls; they are removed after the forward pass and act in this thread alone. The gradient at an output
is taken at the output's edge of the graph, so a successor that works in place makes no difference. Then each call runs
once more, alone, on copies of its inputs, and is differentiated: this gives the gradients by way of this call, whoever
else reads its inputs or shares its parameters.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ....errors import InputError, ModelError
from ...results import Call, Checked, Difference, Pass
from ..arrays import to_numpy
from ..calls import module_of, uncompiled
from ..state import RngAndBuffers, unchanged
from ..submodules import is_keras, named_parameters, own_parameters
from .formulas import TOLERANCE, formula_differences
from .functions import check_backward, custom_functions, recorded_calls
from .module_calls import CallRecorder, ModuleCall, hookable_modules, output_tensors


def trace(model: Any, inputs: tuple[Any, ...], gradient: Any = None) -> Pass:
    """Trace one pass of a network; see `undertow.trace`.

    Raises:
        InputError, ModelError: as `undertow.trace` says.
    """
    network, sources = uncompiled(model), _leaves(inputs)
    module = module_of(network)
    if module is None or isinstance(module, torch.jit.ScriptModule):
        raise InputError(f"model is a {type(model).__name__}; trace looks at the calls of an nn.Module's parts")
    with unchanged(module, sources, buffers=True) as start:
        with CallRecorder(module) as recorder:
            output = _forward(network, sources)
        outputs = [t for t in output_tensors(output) if t.requires_grad]
        if not outputs:
            raise InputError("the output depends on nothing by any gradient (detached, frozen, or made under no_grad)")
        if recorder.copied_outputs:
            _refuse_changed(network, sources, output, start)
        calls = [call for call in recorder.calls if call.is_reported]
        _backward(outputs, _output_gradients(outputs, gradient), calls)
        functions = _check_functions(network, module, sources, outputs, start)
        used = {id(parameter) for call in calls for parameter in _own_parameters(call).values()}
        return Pass(
            calls=tuple(_result(call) for call in calls),
            functions=tuple(functions),
            unreached=tuple(name for name, submodule in hookable_modules(module) if _is_unreached(submodule, used)),
        )


def _leaves(inputs: tuple[Any, ...]) -> list[Tensor]:
    """Return copies of the inputs, of which those of floating point require a gradient."""
    for i, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            raise InputError(f"input {i} is a {type(x).__name__}, not a torch tensor")
    return [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]


def _forward(network: Callable[..., Any], sources: list[Tensor]) -> Any:
    try:
        return network(*(source.clone() for source in sources))  # copies: a network may overwrite its input
    except Exception as error:
        error.add_note(f"while the model ran on an input of shape {', '.join(str(tuple(s.shape)) for s in sources)}")
        raise


def _output_gradients(outputs: list[Tensor], gradient: Any) -> list[Tensor]:
    """Return the gradient at each output: ones where none is given.

    Raises:
        InputError: the gradient does not fit the outputs.
    """
    if gradient is None:
        return [torch.ones_like(output) for output in outputs]
    parts = list(gradient) if isinstance(gradient, tuple) else [gradient]
    if len(parts) != len(outputs):
        raise InputError(f"gradient has {len(parts)} part(s) for {len(outputs)} output(s); pass a tuple, one for each")
    return [_fitting(g, output) for g, output in zip(parts, outputs, strict=True)]


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
    own = [id(parameter) for parameter in own_parameters(module).values()]
    return bool(own) and used.isdisjoint(own)


def _refuse_changed(network: Callable[..., Any], sources: list[Tensor], output: Any, start: RngAndBuffers) -> None:
    """Run the network again without copied outputs, and refuse it where they made a difference.

    Raises:
        ModelError: a module overwrites a view, and something else reads the tensor that it is a view of.
    """
    with start.restored():
        plain = _forward(network, sources)
    if not all(_nearly_equal(a, b) for a, b in zip(output_tensors(plain), output_tensors(output), strict=True)):
        raise ModelError(
            "the model overwrites a view or an input that it reads again, or gives other values each time it runs; "
            "write inplace=False there"
        )


def _nearly_equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = TOLERANCE.get(a.dtype, 1e-2)
    return torch.allclose(a.detach(), b.detach(), rtol=tolerance, atol=tolerance * _largest(b), equal_nan=True)


def _largest(t: Tensor) -> float:
    finite = t.detach()[t.detach().isfinite()]
    return float(finite.abs().amax()) if finite.numel() else 0.0


def _backward(outputs: list[Tensor], gradients: list[Tensor], calls: list[ModuleCall]) -> None:
    """Set each call's gradients at its outputs, by one backward pass."""
    edges = [edge for call in calls for edge in call.edges if edge is not None]
    at_edges = torch.autograd.grad(outputs, edges, gradients, retain_graph=True, allow_unused=True) if edges else ()
    remaining = iter(at_edges)
    for call in calls:
        call.gradients = [None if edge is None else next(remaining) for edge in call.edges]


def _result(call: ModuleCall) -> Call:
    own = _own_parameters(call)
    by_input, by_parameter, note = _own_gradients(call, own)
    formula: dict[str, Difference] = {}
    if by_input and call.gradients and call.gradients[0] is not None and call.gradients[0].dtype in TOLERANCE:
        by_name = {"input": by_input[0], **by_parameter}
        formula = _formula_differences(call, by_name)
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


def _formula_differences(call: ModuleCall, gradients: Mapping[str, Tensor | None]) -> dict[str, Difference]:
    x, y, g = call.arguments.tensors[0], call.outputs[0], call.gradients[0]
    assert g is not None
    if not is_keras(call.module):
        return formula_differences(call.module, x, g, gradients)
    from ...keras_formulas import formula_differences as of_keras

    arrays = {name: None if t is None else to_numpy(t) for name, t in gradients.items()}
    return of_keras(call.module, to_numpy(x), to_numpy(y), to_numpy(g), arrays, str(x.dtype).removeprefix("torch."))


def _own_parameters(call: ModuleCall) -> dict[str, nn.Parameter]:
    """Return the parameters that belong to a call: all below it, unless other modules were called inside."""
    return own_parameters(call.module) if call.has_inner else dict(named_parameters(call.module))


def _own_gradients(
    call: ModuleCall, own: dict[str, nn.Parameter]
) -> tuple[list[Tensor | None], dict[str, Tensor | None], str]:
    """Run a call again, alone; return the gradients by its inputs and parameters, and why there are none."""
    without: tuple[list[Tensor | None], dict[str, Tensor | None]]
    without = [None] * len(call.arguments.tensors), dict.fromkeys(own)
    if all(edge is None for edge in call.edges):
        return *without, "its output carries no gradient (made under no_grad, detached, or all before it is frozen)"
    if all(g is None for g in call.gradients):
        return *without, "the objective does not depend on its output"
    requires_grad = call.arguments.requires_grad
    leaves = [t.detach().requires_grad_(r) for t, r in zip(call.arguments.tensors, requires_grad, strict=True)]
    with call.state.restored():
        args, kwargs = call.arguments.with_tensors([leaf.clone() for leaf in leaves])
        outputs = output_tensors(call.module.forward(*args, **kwargs))
    if len(outputs) != len(call.outputs) or not all(map(_nearly_equal, outputs, call.outputs)):
        return *without, "run again alone, it returned other values, so its own gradients are unknown"
    reached = [(output, g) for output, g in zip(outputs, call.gradients, strict=True) if g is not None]
    inputs = {i: leaf for i, leaf in enumerate(leaves) if leaf.requires_grad}
    trainable = {name: parameter for name, parameter in own.items() if parameter.requires_grad}
    gradients = torch.autograd.grad(
        [output for output, _ in reached],
        [*inputs.values(), *trainable.values()],
        [g for _, g in reached],
        retain_graph=True,  # a weight that a hook computes (weight_norm) has a graph from the first pass
        allow_unused=True,
    )
    by_input = dict(zip(inputs, gradients[: len(inputs)], strict=True))
    by_parameter = dict(zip(trainable, gradients[len(inputs) :], strict=True))
    return [by_input.get(i) for i in range(len(leaves))], {name: by_parameter.get(name) for name in own}, ""


def _check_functions(
    network: Callable[..., Any], module: nn.Module, sources: list[Tensor], outputs: list[Tensor], start: RngAndBuffers
) -> list[Checked]:
    """Check every call of a custom autograd function; the pass runs once more if there are any."""
    classes = custom_functions(outputs)
    if not classes:
        return []
    with start.restored(), CallRecorder(module) as recorder, recorded_calls(classes, recorder.innermost) as calls:
        _forward(network, sources)
    return [check_backward(call) for call in calls]
