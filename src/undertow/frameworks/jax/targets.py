"""Which scores a target means, in the trace of one call: of classes, or of places in dense outputs."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...errors import ModelError, TargetError
from ...outputs import Path, described, head_of
from ...targets import Box, Region, Target, Token, Unit
from ..targets import class_ids, places, refuse_missing, top


@dataclass(frozen=True)
class ChosenScores:
    """The scores to explain.

    Attributes:
        scores: `(B, K)`.
        ids: class ids, int32 `(B, K)`; None where the target is none of classes.
        single: each sample has one target.
    """

    scores: Any
    ids: Any
    single: bool = True


@dataclass(frozen=True, eq=False, repr=False)
class Directions(Target):
    """Weighted sums of the scores, `(K, classes)`, in the place of classes."""

    weights: Any


def is_function(target: Any) -> bool:
    """Whether a target is given the whole output of the model."""
    return callable(target) and not isinstance(target, Target)


def scores_of(output: Any, path: Path | None = None) -> Any:
    """Return the part of a model's output that holds its scores, `(B, ...)`.

    Raises:
        ModelError: there is no such part, or it is no float array.
    """
    scores = head_of(output, path)
    if not isinstance(scores, jax.Array) or not jnp.issubdtype(scores.dtype, jnp.floating):
        returned = f"{scores.dtype} scores" if isinstance(scores, jax.Array) else described(output)
        remedy = "" if path is not None else "name the part that holds the scores, as in output='out', or "
        raise ModelError(
            f"the model returned {returned}; it must be a float array, a tuple of them, or have .logits; {remedy}"
            "pass target=lambda output: ... that returns one score for each sample"
        )
    return scores


def given_ids(target: Any, batch: int) -> tuple[Any, bool]:
    """Return class ids `(B, K)`, None where the target may be anything else, and whether there is one a sample."""
    if target is None or isinstance(target, str | Target) or callable(target):
        return None, not isinstance(target, str)
    try:
        return class_ids(target, batch)
    except TargetError:  # a place in dense scores, perhaps, which only the output tells
        return None, True


def chosen_scores(output: Any, target: Any, ids: Any, batch: int | None) -> ChosenScores:
    """Return the scores that a target means.

    Args:
        output: the scores of a model, `(B, ...)`; what a target function returned where the target is one.
        target: as `undertow.explain` takes it.
        ids: `(B, K)` where the target is class ids, else None.
        batch: the number of samples, where the inputs tell.

    Raises:
        TargetError: the target does not fit the scores, or its function does not return one score for each sample.
        ModelError: the output is not `(B, classes)`, and the target names no place in it.
    """
    if is_function(target):
        return ChosenScores(_checked(output, batch)[:, None], None)
    if isinstance(target, Directions):
        return ChosenScores(output @ jnp.asarray(target.weights, output.dtype).T, None, single=False)
    if isinstance(target, Unit | Box):
        remedy = "at=, or a function of the output" if isinstance(target, Unit) else "a function of the output"
        raise ModelError(f"ut.targets.{type(target).__name__.lower()} is not there for JAX yet; pass {remedy}")
    if isinstance(target, Region):
        weights = jnp.asarray(target.weights(output.shape), output.dtype)
        return ChosenScores((output * weights).sum(range(1, output.ndim))[:, None], None)
    if isinstance(target, Token):
        if output.ndim != 3:
            raise TargetError(f"a token has scores (batch, positions, vocabulary); the model returned {output.shape}")
        return _of_classes(_at_position(output, target.position), target.target, None, batch)
    if output.ndim > 2 and target is not None and not isinstance(target, str):
        indices, single = places(target, output.shape)
        rows = np.broadcast_to(np.arange(len(indices))[:, None], indices.shape[:2])
        return ChosenScores(output[(rows, *np.moveaxis(indices, -1, 0))], None, single)
    return _of_classes(output, target, ids, batch)


def refuse_non_class_scores(scores: Any, batch: int | None) -> None:
    """Refuse an output that is not `(B, classes)`.

    Raises:
        ModelError: with the shape.
    """
    if scores.ndim != 2 or batch not in (None, scores.shape[0]):
        rows = "" if batch is None else f" for a batch of {batch}"
        raise ModelError(
            f"the model returned shape {scores.shape}{rows}, not ({'B' if batch is None else batch}, classes); "
            "pass target=lambda output: ... that returns one score for each sample"
        )


def _at_position(output: Any, position: Any) -> Any:
    positions = np.asarray(position)
    return output[:, position] if not positions.ndim else output[np.arange(len(output)), positions]


def _of_classes(output: Any, target: Any, ids: Any, batch: int | None) -> ChosenScores:
    refuse_non_class_scores(output, batch)
    single = not isinstance(target, str)
    if ids is None and (target is None or not single):
        ids = jax.lax.top_k(output, 1 if target is None else top(target, output.shape[1]))[1]
    elif ids is None:
        ids, single = class_ids(target, len(output))
        refuse_missing(ids, output.shape[1])
    return ChosenScores(jnp.take_along_axis(output, jnp.asarray(ids), 1), ids, single)


def _checked(scores: Any, batch: int | None) -> Any:
    if isinstance(scores, jax.Array) and scores.ndim == 1 and batch in (None, len(scores)):
        return scores
    what = f"shape {scores.shape}" if isinstance(scores, jax.Array) else f"a {type(scores).__name__}"
    raise TargetError(f"the target function returned {what}; it must return one score for each sample, ({batch},)")
