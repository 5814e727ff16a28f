"""How a gradient passes an activation: three papers in three lines.

A rule is a function `(g, local) -> g`. `g` is the gradient that arrives at the activation's output; `local` is the
activation's own backward, `h -> f'(x) * h`. What the rule returns is the gradient at the activation's input, with the
shape and dtype of `g`. Rules are framework-free: they touch arrays through `relu` and arithmetic alone.

Where the rules differ (x is the pre-activation):

| activation | where | gradient | deconvnet | guided |
|---|---|---|---|---|
| ReLU | x <= 0 | 0 | relu(g) | 0 |
| ReLU6, Hardtanh | beyond a plateau's edge | 0 | relu(g) | 0: the plateau passes nothing, whatever the sign of g |
| LeakyReLU, PReLU, RReLU | x < 0, slope a | a·g | relu(g) | a·relu(g): the slope is kept, and its sign with it |
"""

from collections.abc import Callable
from functools import singledispatch
from typing import Any

import numpy as np

from .errors import InputError, did_you_mean

Local = Callable[[Any], Any]
Rule = Callable[[Any, Local], Any]


@singledispatch
def relu(g: Any) -> Any:
    """Return the positive part of an array, elementwise; the shape and dtype stay. NaN stays NaN.

    Each framework registers its own kernel for its own tensors when it is first used.

    >>> relu(np.array([-1.0, 2.0]))
    array([0., 2.])
    """
    return np.maximum(g, 0)


def gradient(g: Any, local: Local) -> Any:
    """Pass the gradient as it is: the plain derivative of the score.

    Source: Simonyan et al. 2013, arXiv 1312.6034.

    >>> gradient(np.array([-2.0, 3.0]), lambda h: h * np.array([1.0, 0.0]))
    array([-2.,  0.])
    """
    return local(g)


def deconvnet(g: Any, local: Local) -> Any:
    """Pass the gradient's positive part and ignore what the activation saw.

    Source: Zeiler and Fergus 2013, arXiv 1311.2901.

    >>> deconvnet(np.array([-2.0, 3.0]), lambda h: h * np.array([1.0, 0.0]))
    array([0., 3.])
    """
    return relu(g)


def guided(g: Any, local: Local) -> Any:
    """Pass the gradient's positive part through the activation's own backward.

    Source: Springenberg et al. 2014, arXiv 1412.6806.

    >>> guided(np.array([-2.0, 3.0, 4.0]), lambda h: h * np.array([1.0, 0.0, 1.0]))
    array([0., 0., 4.])
    """
    return local(relu(g))


RULES: dict[str, Rule] = {rule.__name__: rule for rule in (gradient, deconvnet, guided)}


def resolve(rule: str | Rule) -> tuple[str, Rule]:
    """Return a rule's name and function, from either.

    Raises:
        InputError: no rule has that name, or the argument is neither a name nor a function.

    >>> resolve("guided")[0]
    'guided'
    """
    if callable(rule):
        return getattr(rule, "__name__", type(rule).__name__), rule
    if isinstance(rule, str) and rule in RULES:
        return rule, RULES[rule]
    hint = did_you_mean(str(rule), RULES)
    raise InputError(f"unknown rule {rule!r}{hint} (known: {', '.join(RULES)}, or a function (g, local) -> g)")
