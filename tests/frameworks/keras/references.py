"""The independent twin of an explanation of a Keras network: it replaces each activation while an eager run calls it.

Nothing here traces a graph or imports the library. While the twin is open, the Python functions that Keras and people
call for an activation (`tf.nn.relu`, Keras's own kernels, `ReLU.static_call`, ...) answer with a `tf.custom_gradient`
whose backward applies the rule. A ReLU-like activation's own backward is written down here by formula, so what Keras
makes of `max_value`, `negative_slope` and `threshold` does not enter. It cannot see into `tf.function`: for those the
table of networks has a plain twin.
"""

import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
from keras import tree

Local = Callable[[Any], Any]


def _positive(g: Any) -> Any:
    return tf.where(g <= 0, tf.zeros_like(g), g)


RULES: dict[str, Callable[[Any, Local], Any]] = {
    "gradient": lambda g, local: local(g),
    "deconvnet": lambda g, local: _positive(g),
    "guided": lambda g, local: local(_positive(g)),
}


def piecewise(x: Any, slope: Any = 0.0, top: float = np.inf, threshold: float = 0.0) -> tuple[Any, Any]:
    """Return `slope * (x - threshold)` up to the threshold, `x` above it and `top` beyond that, and its derivative."""
    low, high = x <= threshold, x >= top
    ones = tf.ones_like(x)
    value = tf.where(low, slope * (x - threshold), tf.where(high, top * ones, x))
    return value, tf.where(low, slope * ones, tf.where(high, 0 * ones, ones))


def _static_call(x: Any, negative_slope: float = 0.0, max_value: float | None = None, threshold: float = 0.0) -> Any:
    return piecewise(x, negative_slope, np.inf if max_value is None else max_value, threshold)


def _clip(x: Any, low: Any, high: Any, name: Any = None) -> Any:
    return piecewise(x, top=float(high)) if float(low) == 0 else None


def _maximum(x: Any, y: Any, name: Any = None) -> Any:
    zero_first = _is_zero(x)
    return piecewise(tf.convert_to_tensor(y if zero_first else x)) if zero_first or _is_zero(y) else None


def _is_zero(x: Any) -> bool:
    return not isinstance(x, tf.Variable) and np.ndim(x) == 0 and float(x) == 0


NN = "keras.src.backend.tensorflow.nn"
RELU_LIKE: dict[str, Callable[..., Any]] = {
    "tensorflow.nn.relu": lambda x, name=None: piecewise(x),
    "tensorflow.nn.relu6": lambda x, name=None: piecewise(x, top=6.0),
    "tensorflow.nn.leaky_relu": lambda x, alpha=0.2, name=None: piecewise(x, alpha),
    "tensorflow.clip_by_value": _clip,
    "tensorflow.maximum": _maximum,
    "keras.src.activations.activations.ReLU.static_call": _static_call,
}
SMOOTH = [f"tensorflow.nn.{name}" for name in ("elu", "selu", "softplus", "silu", "gelu")]
SMOOTH += [f"{NN}.{name}" for name in ("elu", "celu", "hard_silu", "gelu", "silu", "selu", "softplus")]
SMOOTH += ["keras.src.activations.activations.Mish.static_call"]
LEFT_ALONE = [f"{NN}.hard_sigmoid"]


class Twin:
    """Answers every activation call, and counts those that a gradient came back through."""

    def __init__(self, rule: Callable[[Any, Local], Any]) -> None:
        self.rule, self.calls, self._inside = rule, 0, False

    def ruled(self, x: Any, value: Any, local: Local) -> Any:
        @tf.custom_gradient
        def apply(_: Any) -> Any:
            def backward(g: Any) -> Any:
                self.calls += 1
                return self.rule(g, local)

            return tf.identity(value), backward

        return apply(x)

    def by_formula(self, original: Any, formula: Callable[..., Any]) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = None if self._inside else formula(*args, **kwargs)
            if result is None:
                return original(*args, **kwargs)
            value, derivative = (tf.stop_gradient(part) for part in result)
            x = next(a for a in (*args, *kwargs.values()) if tf.is_tensor(a) and a.shape == value.shape)
            return self.ruled(x, value, lambda h: h * derivative)

        return call

    def by_itself(self, original: Any, acts: bool) -> Any:
        """Run the original with nothing replaced inside it, and let the rule act on the whole of it, or leave it."""

        def call(x: Any, *args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return original(x, *args, **kwargs)
            self._inside = True
            try:
                with tf.GradientTape(persistent=True) as tape:
                    tape.watch(x)
                    value = original(x, *args, **kwargs)
            finally:
                self._inside = False
            return self.ruled(x, value, lambda h: tape.gradient(value, x, h)) if acts else value

        return call

    def prelu(self, layer: Any, x: Any) -> Any:
        value, derivative = piecewise(x, tf.stop_gradient(tf.convert_to_tensor(layer.alpha)))
        return self.ruled(x, value, lambda h: h * derivative)


@contextmanager
def replaced(twin: Twin, activations: str) -> Iterator[None]:
    with ExitStack() as stack:
        replacements = {name: ("formula", formula) for name, formula in RELU_LIKE.items()}
        replacements |= dict.fromkeys(SMOOTH, ("itself", activations == "all"))
        replacements |= dict.fromkeys(LEFT_ALONE, ("itself", False))
        for path, (how, argument) in replacements.items():
            name = path.rpartition(".")[2]
            original = pkgutil.resolve_name(path)
            new = twin.by_formula(original, argument) if how == "formula" else twin.by_itself(original, argument)
            stack.enter_context(mock.patch(path, staticmethod(new) if name == "static_call" else new))
        stack.enter_context(mock.patch.object(keras.layers.PReLU, "call", lambda layer, x: twin.prelu(layer, x)))
        yield


def reference(model: Any, x: Any, target: int, rule: Any, activations: str = "relu-like") -> tuple[Any, int]:
    """Explain the score of one class of `model(x)` eagerly.

    Returns:
        The map, NumPy, of the shape of x (a tuple for a tuple), and how many activation calls the rule was applied to.
    """

    def score(output: Any) -> Any:
        output = output[0] if isinstance(output, tuple) else output["logits"] if isinstance(output, dict) else output
        return output[:, target]

    maps, calls = ruled(
        lambda given: model(list(given) if isinstance(x, tuple) else given), x, score, rule, activations
    )
    given = x if isinstance(x, tuple) else (x,)
    values = tuple(np.zeros_like(part) if m is None else m for m, part in zip(maps, given, strict=True))
    return (values if isinstance(x, tuple) else values[0]), calls


def ruled(
    model: Callable[[Any], Any],
    x: Any,
    score: Callable[[Any], Any],
    rule: Any = "gradient",
    activations: str = "relu-like",
) -> tuple[list[Any], int]:
    """Explain any function of any output eagerly.

    Args:
        model: called with one argument, tensors in the structure of `x`.
        x: arrays or tensors, nested in tuples, lists and dicts.
        score: of the output as the model returned it; it is summed.

    Returns:
        For each leaf of `x`, in the order in which they stand there, its gradient as NumPy, None for whole numbers and
        for what the score does not depend on; and how many activation calls the rule was applied to.
    """
    twin = Twin(RULES[rule] if isinstance(rule, str) else rule)
    fed = tree.map_structure(tf.convert_to_tensor, x)
    leaves = _in_order(fed)
    watched = [leaf for leaf in leaves if leaf.dtype.is_floating]
    with replaced(twin, activations), tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(watched)
        total = tf.reduce_sum(score(model(fed)))
    with replaced(twin, activations):
        found = iter(tape.gradient(total, watched))
    maps = [next(found) if leaf.dtype.is_floating else None for leaf in leaves]
    return [None if m is None else np.array(m) for m in maps], twin.calls


def _in_order(x: Any) -> list[Any]:
    """Return the leaves in the order in which they stand; `keras.tree` sorts the keys of a dict."""
    if isinstance(x, dict | tuple | list):
        return [leaf for item in (x.values() if isinstance(x, dict) else x) for leaf in _in_order(item)]
    return [x]
