"""Gradient, deconvnet and guided in one graph: which of them acts is told when it runs, so that one trace serves all.

Each is two choices at an activation: whether the incoming gradient's negative part is cut off, and whether the
activation's own backward is applied. The graph computes what is chosen alone, without a pass over the other.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from ....rules import deconvnet, gradient, guided, relu
from ....tables import ActivationRule
from ...base import Request

SWITCHES: dict[Any, tuple[bool, bool]] = {gradient: (False, True), deconvnet: (True, False), guided: (True, True)}
"""By rule: whether the incoming gradient is cut off at zero, and whether the activation's own backward is applied."""


def switches_of(request: Request) -> list[Any]:
    """Return what chooses a request's rule in a graph that serves several; nothing where it has a graph of its own."""
    if request.through != "graph" or request.rule not in SWITCHES:
        return []
    return [tf.constant(flag) for flag in SWITCHES[request.rule]]


def switched_rule(is_cut: Any, is_local: Any) -> ActivationRule:
    """Return the rule that two bool tensors of a graph choose, see `SWITCHES`."""

    def switched(g: Any, local: Callable[[Any], Any]) -> Any:
        return _where(is_local, local, _where(is_cut, relu, g))

    return switched


def _where(flag: Any, function: Callable[[Any], Any], x: Any) -> Any:
    """Return `function(x)` where a flag is on when the graph runs, else `x`; `tf.cond` would trace a graph for each."""
    off, on = tf.raw_ops.Switch(data=x, pred=flag)
    merged = tf.raw_ops.Merge(inputs=[off, function(on)]).output
    merged.set_shape(x.shape)
    return merged
