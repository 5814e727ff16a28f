"""One pass, call by call: each layer call's inputs, outputs and gradients, and closed formulas for them.

The network runs eagerly under a tape, and each layer's output goes through an identity, at which the tape tells the
gradient of everything that reads it. Then each call runs once more, alone, on its inputs: this gives the gradients by
way of this call, whoever else reads its inputs or shares its weights.
"""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from ....errors import InputError
from ....structures import map_tensors, tensors_with_paths
from ...keras_formulas import TOLERANCE, formula_differences
from ...keras_layers import named_layers, own_variables
from ...own_passes import own_pass
from ...results import Call, Pass
from ..arrays import to_numpy
from ..calls import refuse_other_backends, restored, run, tensors
from ..outputs import is_float
from ..watching import wrapped

NOT_REACHED = "the objective does not depend on its output"


@dataclass(eq=False)
class _LayerCall:
    """One layer call, while it runs and after.

    Attributes:
        number: how often the layer had been called before in this pass.
        args, kwargs: what it was called with.
        has_inner: another layer was called inside.
        outputs: the tensors of floating point that it returned, each as all its readers get it.
    """

    name: str
    layer: Any
    number: int
    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    has_inner: bool = False
    outputs: list[Any] = field(default_factory=list)

    @property
    def inputs(self) -> list[Any]:
        """The tensors that it was given, each once."""
        given = [tensor for _, tensor in tensors_with_paths((self.args, self.kwargs)) if tf.is_tensor(tensor)]
        return list({id(tensor): tensor for tensor in given}.values())

    @property
    def is_reported(self) -> bool:
        """Whether it returned a tensor, and either no layer called inside or it has weights of its own."""
        return bool(self.outputs) and (not self.has_inner or bool(own_variables(self.layer)))

    @property
    def again(self) -> Callable[..., Any]:
        """What runs it once more; in mixed precision Keras casts its weights around the call alone."""
        return self.layer if self.layer.compute_dtype != self.layer.variable_dtype else self.call

    @property
    def has_formula(self) -> bool:
        """Whether a closed formula of its layer can hold: that of a batch norm is of one out of training."""
        is_norm = isinstance(self.layer, keras.layers.BatchNormalization)
        return not self.has_inner and not (is_norm and self.kwargs.get("training"))

    @property
    def variables(self) -> dict[str, Any]:
        """The weights that belong to it, by name: all below it, unless other layers were called inside."""
        below = [("", self.layer), *(() if self.has_inner else named_layers(self.layer))]
        return {f"{name}.{v.name}" if name else v.name: v for name, layer in below for v in own_variables(layer)}


def trace(model: Any, inputs: tuple[Any, ...], gradient: Any = None) -> Pass:
    """Trace one pass of a network, out of training; see `undertow.trace`.

    Raises:
        InputError: the model is no Keras layer, or runs in a `tf.function` of its own; or as `undertow.trace` says.
    """
    refuse_other_backends()
    if not isinstance(model, keras.Layer):
        raise InputError(f"model is a {type(model).__name__}; trace looks at the calls of a keras.Model's layers")
    sources = tensors(inputs)
    calls: list[_LayerCall] = []
    with own_pass(), restored(model.variables), tf.GradientTape(persistent=True) as tape:
        tape.watch([source for source in sources if source.dtype.is_floating])
        with _recorded(model, calls):
            output = run(model, sources, {}, training=False)
        outputs = [tensor for _, tensor in tensors_with_paths(output) if is_float(tensor)]
        read = {id(variable) for variable in tape.watched_variables()}
        _refuse_unseen(model, calls, read)
        with tape.stop_recording():
            reported = [call for call in calls if call.is_reported]
            begin = _output_gradients(outputs, gradient)
            places = [tensor for call in reported for tensor in call.outputs]
            gradients = tape.gradient(outputs, places, output_gradients=begin)
            if all(g is None for g in gradients):
                raise InputError("the output depends on nothing by any gradient (tf.stop_gradient, or rounding)")
            remaining = iter(gradients)
            results = tuple(_result(call, [next(remaining) for _ in call.outputs]) for call in reported)
    called = {id(variable) for call in calls for variable in own_variables(call.layer)}
    within = {id(v) for call in reported for v in call.variables.values()}
    unreached = tuple(
        name
        for name, layer in dict(named_layers(model)).items()
        if own_variables(layer) and not any(id(v) in called | within for v in own_variables(layer))
    )
    return Pass(calls=results, functions=(), unreached=unreached)


def _recorded(model: Any, calls: list[_LayerCall]) -> Any:
    """Return a context in which calls of the model and its layers, of this thread, are added to a list."""
    thread, counts, running = threading.get_ident(), Counter[str](), list[_LayerCall]()
    names: dict[int, tuple[str, Any]] = {id(model): ("", model)}
    for name, layer in named_layers(model):
        names.setdefault(id(layer), (name, layer))

    def around(name: str, layer: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != thread or not tf.executing_eagerly():
            return call(*args, **kwargs)
        if running:
            running[-1].has_inner = True
        this = _LayerCall(name, layer, counts[name], call, args, kwargs)
        counts[name] += 1
        calls.append(this)
        running.append(this)
        try:
            output = call(*args, **kwargs)
        finally:
            del running[running.index(this) :]

        def passed_on(tensor: Any) -> Any:
            if not is_float(tensor):
                return tensor
            this.outputs.append(tf.identity(tensor))
            return this.outputs[-1]

        return map_tensors(output, passed_on)

    return wrapped(dict(names.values()), around)


def _refuse_unseen(model: Any, calls: Sequence[_LayerCall], read: set[int]) -> None:
    """Refuse a network in which a layer ran out of sight: its weights were read, and neither it nor one above called.

    Args:
        read: the ids of TensorFlow's variables that the tape saw.
    """
    seen = {id(v.value) for call in calls if not call.has_inner for v in call.layer.weights}
    seen |= {id(v.value) for call in calls for v in own_variables(call.layer)}
    for name, layer in named_layers(model):
        if any(id(v.value) in read - seen for v in own_variables(layer)):
            raise InputError(f"layer {name!r} runs in a tf.function, out of sight; trace the model without it")


def _output_gradients(outputs: Sequence[Any], gradient: Any) -> list[Any]:
    """Return the gradient at each output: ones where none is given. Raises InputError: it does not fit."""
    if gradient is None:
        return [tf.ones_like(output) for output in outputs]
    parts = list(gradient) if isinstance(gradient, tuple) else [gradient]
    if len(parts) != len(outputs):
        raise InputError(f"gradient has {len(parts)} part(s) for {len(outputs)} output(s); pass a tuple, one for each")
    for part, output in zip(parts, outputs, strict=True):
        if np.shape(part) != tuple(output.shape):
            raise InputError(f"gradient has shape {np.shape(part)} where the output has {tuple(output.shape)}")
    return [tf.cast(part, output.dtype) for part, output in zip(parts, outputs, strict=True)]


def _result(call: _LayerCall, at_outputs: Sequence[Any]) -> Call:
    variables = call.variables
    by_input, by_variable, note = _own_gradients(call, variables, at_outputs)
    formula = {}
    if by_input and call.has_formula and by_input[0] is not None and len(call.inputs) == len(call.outputs) == 1:
        x, y, g = (to_numpy(tensor) for tensor in (call.inputs[0], call.outputs[0], at_outputs[0]))
        gradients = {"input": to_numpy(by_input[0])}
        gradients |= {name: to_numpy(value) for name, value in by_variable.items() if value is not None}
        formula = formula_differences(call.layer, x, y, g, gradients, call.outputs[0].dtype.name)
    return Call(
        name=call.name,
        kind=type(call.layer).__name__,
        call=call.number,
        inputs=tuple(call.inputs),
        outputs=tuple(call.outputs),
        input_gradients=tuple(by_input),
        output_gradients=tuple(at_outputs),
        parameters={name: tf.identity(variable.value) for name, variable in variables.items()},
        parameter_gradients=by_variable,
        formula=formula,
        note=note,
    )


def _own_gradients(
    call: _LayerCall, variables: dict[str, Any], at_outputs: Sequence[Any]
) -> tuple[list[Any], dict[str, Any], str]:
    """Run a call again, alone; return the gradients by its inputs and weights, and why there are none."""
    inputs = call.inputs
    without: tuple[list[Any], dict[str, Any]] = [None] * len(inputs), dict.fromkeys(variables)
    if all(g is None for g in at_outputs):
        return *without, NOT_REACHED
    leaves = {id(tensor): tf.identity(tensor) for tensor in inputs}
    args, kwargs = map_tensors((call.args, call.kwargs), lambda t: leaves.get(id(t), t))
    trainable = {name: v.value for name, v in variables.items() if v.trainable and v.value.dtype.is_floating}
    floats = {i: leaves[id(t)] for i, t in enumerate(inputs) if t.dtype.is_floating}
    with tf.GradientTape() as tape:
        tape.watch(list(floats.values()))
        outputs = [tensor for _, tensor in tensors_with_paths(call.again(*args, **kwargs)) if is_float(tensor)]
    if len(outputs) != len(call.outputs) or not all(map(_nearly_equal, outputs, call.outputs)):
        return *without, "run again alone, it returned other values, so its own gradients are unknown"
    pairs = [(output, g) for output, g in zip(outputs, at_outputs, strict=True) if g is not None]
    gradients = tape.gradient(
        [output for output, _ in pairs],
        [*floats.values(), *trainable.values()],
        output_gradients=[g for _, g in pairs],
    )
    dense = [None if g is None else tf.convert_to_tensor(g) for g in gradients]
    by_input = dict(zip(floats, dense[: len(floats)], strict=True))
    by_variable = dict(zip(trainable, dense[len(floats) :], strict=True))
    return [by_input.get(i) for i in range(len(inputs))], {name: by_variable.get(name) for name in variables}, ""


def _nearly_equal(a: Any, b: Any) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    first, second = to_numpy(a).astype(np.float64), to_numpy(b).astype(np.float64)
    tolerance = TOLERANCE.get(a.dtype.name, 1e-2)
    largest = np.abs(second[np.isfinite(second)]).max(initial=0)
    return np.allclose(first, second, rtol=tolerance, atol=tolerance * largest, equal_nan=True)
