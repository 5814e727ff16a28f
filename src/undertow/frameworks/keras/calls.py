"""One call of a user's model: its inputs, its output, the scores to explain, and the variables to put back."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from ...errors import InputError, ModelError
from ...outputs import Path, head_of
from ...structures import tensors_with_paths
from ..base import refuse_backend


def refuse_other_backends() -> None:
    """Refuse a Keras that does not run on TensorFlow.

    Raises:
        FrameworkError: it runs on JAX, say, or on torch, whose tensors go to the side of PyTorch.
    """
    refuse_backend(keras.backend.backend())


def tensors(inputs: tuple[Any, ...], is_plain: bool = True) -> tuple[Any, ...]:
    """Return the inputs as eager tensors.

    Raises:
        InputError: an input is no array, is complex or has another batch size, or none is of floating point.
    """
    converted = tuple(_tensor(index, x) for index, x in enumerate(inputs))
    for index, x in enumerate(converted):
        if is_plain and (x.shape.rank == 0 or x.shape[0] != converted[0].shape[0]):
            raise InputError(f"input {index} has shape {tuple(x.shape)}; every input needs the same first (batch) axis")
        if x.dtype.is_complex:
            raise InputError(f"input {index} is complex ({x.dtype.name}); pass its parts, tf.math.real(x) and imag(x)")
    if not any(x.dtype.is_floating for x in converted):
        kind = converted[0].dtype.name
        raise InputError(f"x is {kind}; a map needs floating point, as in tf.cast(x, 'float32') or embeddings")
    return converted


def _tensor(index: int, x: Any) -> Any:
    if isinstance(x, np.ndarray | tf.Variable | tf.Tensor):
        try:
            tensor = tf.convert_to_tensor(x)
        except (ValueError, TypeError) as error:
            raise InputError(f"input {index} is an array of {x.dtype}, which TensorFlow lacks; pass float32") from error
        if hasattr(tensor, "numpy"):
            return tensor
        raise InputError(f"input {index} is a symbolic tensor; pass numbers, outside tf.function")
    raise InputError(f"input {index} is a {type(x).__name__}, not a TensorFlow tensor or NumPy array")


def run(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], training: bool = False) -> Any:
    """Run the model; a Keras layer is called with `training`, and with named inputs as one mapping.

    An exception of its own is raised with the shapes of its input.
    """
    try:
        if not isinstance(model, keras.Layer):
            return model(*args, **kwargs)
        if kwargs:
            return model(dict(kwargs), training=training)
        if len(args) > 1 and len(getattr(model, "inputs", None) or ()) == len(args):
            return model(list(args), training=training)  # a functional model takes its inputs as one structure
        return model(*args, training=training)
    except Exception as error:
        given = [tensor for _, tensor in tensors_with_paths((args, kwargs))]
        shapes = ", ".join(f"{tuple(x.shape)} {getattr(x.dtype, 'name', x.dtype)}" for x in given)
        error.add_note(f"while the model ran on an input of shape {shapes}")
        raise


def scores_of(output: Any, path: Path | None = None) -> Any:
    """Return the part of a model's output that holds its scores, `(B, ...)`.

    Raises:
        ModelError: there is no such part, or it is no float tensor.
    """
    scores = head_of(output, path)
    if not isinstance(scores, tf.Tensor) or not scores.dtype.is_floating:
        description = f"{scores.dtype.name} scores" if isinstance(scores, tf.Tensor) else f"a {type(output).__name__}"
        raise ModelError(
            f"the model returned {description}; it must be a float tensor, a tuple of them, or have logits"
        )
    return scores


def output_of(model: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    """Run the model and return its scores, `(B, ...)`; errors as of `scores_of`."""
    return scores_of(run(model, inputs, {}))


def refuse_non_class_scores(output: Any, batch: int) -> None:
    """Refuse an output that is not `(B, classes)`.

    Raises:
        ModelError: with the shape.
    """
    if output.shape.rank != 2 or output.shape[0] != batch or output.shape[1] is None:
        shape = "unknown" if output.shape.rank is None else tuple(output.shape)
        raise ModelError(
            f"the model returned shape {shape} for a batch of {batch}, not ({batch}, classes); "
            "pass target=lambda output: ... that returns one score for each sample"
        )


def refuse_non_finite(scores: Any) -> None:
    """Refuse scores `(B, K)` of which one is infinite or not a number.

    Raises:
        ModelError: naming the first such sample.
    """
    values = scores.numpy().astype(np.float64)
    if not np.isfinite(values).all():
        sample, column = np.argwhere(~np.isfinite(values))[0]
        score = values[sample, column]
        raise ModelError(f"the score of sample {sample} is {score}; check its pixels and the model's weights for NaN")


@contextmanager
def restored(variables: Sequence[Any]) -> Iterator[None]:
    """On exit, put back the values of variables that a call may write: batch statistics, random generators' states."""
    values = [(variable, tf.identity(variable)) for variable in variables]
    try:
        yield
    finally:
        for variable, value in values:
            variable.assign(value)
