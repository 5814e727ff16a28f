"""Arguments of a loss as arrays and what puts these together again; of the differentiated ones, which arrays have a
gradient: parameters of an nnx module, arrays of floating point of anything else.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ....errors import InputError
from ..marks import dotted


@dataclass(frozen=True, eq=False)
class Argument:
    """One argument, taken apart.

    Attributes:
        arrays: what is traced.
        paths: of each, dotted, without a leading "params".
        differentiable: of each, whether a gradient by it is asked for where the argument is differentiated.
        structure: of the tree of its leaves.
        places: of each array among the leaves.
        leaves: the others in their places.
        definition: of an nnx module, else None.
    """

    arrays: tuple[Any, ...]
    paths: tuple[str, ...]
    differentiable: tuple[bool, ...]
    structure: Any
    places: tuple[int, ...]
    leaves: tuple[Any, ...]
    definition: Any = None

    def rebuilt(self, arrays: Sequence[Any]) -> Any:
        """Return the argument with other arrays; of an nnx module a copy."""
        tree = self._tree(arrays)
        if self.definition is None:
            return tree
        return sys.modules["flax.nnx"].merge(self.definition, *tree, copy=True)

    def gradients(self, by_array: Sequence[Any]) -> Any:
        """Return gradients in the argument's own structure, None where there is none; of an nnx module its state's."""
        if self.definition is not None:
            tree = self._tree(by_array)
            return tree[0]
        leaves: list[Any] = [None] * len(self.leaves)
        for i, gradient in zip(self.places, by_array, strict=True):
            leaves[i] = gradient
        return jax.tree.unflatten(self.structure, leaves)

    def _tree(self, arrays: Sequence[Any]) -> Any:
        leaves = list(self.leaves)
        for i, array in zip(self.places, arrays, strict=True):
            leaves[i] = array
        return jax.tree.unflatten(self.structure, leaves)

    def state_of(self, module: Any) -> tuple[Any, ...]:
        """Return what a call may have changed in an nnx module that was rebuilt: all but its parameters."""
        if self.definition is None:
            return ()
        nnx = sys.modules["flax.nnx"]
        _, rest = nnx.state(module, nnx.Param, ...)
        now = {dotted(path): leaf for path, leaf in jax.tree.flatten_with_path(rest)[0]}
        return tuple(now[path] for path, own in zip(self.paths, self.differentiable, strict=True) if not own)

    def update(self, module: Any, state: Sequence[Any]) -> None:
        """Give an nnx module the state that the call left."""
        if self.definition is not None and state:
            remaining = iter(state)
            arrays = [x if own else next(remaining) for x, own in zip(self.arrays, self.differentiable, strict=True)]
            sys.modules["flax.nnx"].update(module, self._tree(arrays)[1])


def taken_apart(value: Any) -> Argument:
    """Take an argument apart.

    Raises:
        InputError: an nnx module lies inside another structure.
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(value, nnx.Pytree):
        definition, *states = nnx.split(value, nnx.Param, ...)
        with_paths, structure = jax.tree.flatten_with_path(tuple(states))
        paths = [dotted(path[1:]) for path, _ in with_paths]
        own = tuple(path[0].idx == 0 and _is_inexact(leaf) for path, leaf in with_paths)
        leaves = tuple(leaf for _, leaf in with_paths)
        return Argument(leaves, tuple(paths), own, structure, tuple(range(len(leaves))), leaves, definition)
    if nnx is not None and any(isinstance(leaf, nnx.Pytree) for leaf in jax.tree.leaves(value, is_leaf=_is_nnx)):
        raise InputError("an nnx module lies inside another argument of the loss; pass it as an argument of its own")
    with_paths, structure = jax.tree.flatten_with_path(value)
    at = tuple(i for i, (_, leaf) in enumerate(with_paths) if isinstance(leaf, jax.Array | np.ndarray))
    arrays = tuple(with_paths[i][1] for i in at)
    paths = [dotted(with_paths[i][0]).removeprefix("params.") for i in at]
    inexact = tuple(map(_is_inexact, arrays))
    return Argument(arrays, tuple(paths), inexact, structure, at, tuple(leaf for _, leaf in with_paths))


def _is_nnx(value: Any) -> bool:
    return isinstance(value, sys.modules["flax.nnx"].Pytree)


def _is_inexact(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))
