"""A user's model as a pure function of its weights and its arguments: what can be traced, and traced once.

| model | weights | taken for the same while these are |
|---|---|---|
| Flax nnx module | its state | its graph definition |
| Flax linen module, bound | its variables | the module |
| Equinox module, mapped over the batch, since it takes one sample | its arrays | the rest of it |
| Keras model on JAX | its variables | the model and the plain attributes of its layers |
| `functools.partial(f, params)` | the arrays in it | `f`, if that is a `jax.jit` function or a linen method |
| `jax.jit` function | what it captured | the function, as JAX itself takes it |
| any other function | what it captured | never: it is traced for each call, since what it captured may have changed |
"""

import functools
import inspect
import sys
import types
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from ...errors import ModelError
from ...structures import tensors_with_paths
from ..base import roots_of
from .marks import dotted

_PLAIN_TYPES = frozenset((bool, int, float, str, bytes, type(None)))


@dataclass(frozen=True, eq=False)
class JaxNetwork:
    """A model as a function of its weights.

    Attributes:
        function: from weights, positional and keyword arguments, and whether to act as in training, to the output.
        weights: arrays.
        paths: the dotted name of each.
        key: two networks with the same key differ in their weights alone; None: nobody can tell.
        channels_last: images are `(B, H, W, C)`; None where only their sizes tell.
        dies_with: what the key must not outlive.
        model: the user's own; None where this stands for none.
        wrap: what was made of its network.
    """

    function: Callable[[Sequence[Any], tuple[Any, ...], Mapping[str, Any], bool], Any]
    weights: tuple[Any, ...] = ()
    paths: tuple[str, ...] = ()
    key: Hashable | None = None
    channels_last: bool | None = None
    dies_with: tuple[Any, ...] = ()
    model: Any = None
    wrap: Callable[["JaxNetwork"], "JaxNetwork"] = lambda network: network

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.weights, args, kwargs, False)

    def anew(self) -> "JaxNetwork":
        """Return the same, weights too, made again of the user's own model, whose calls may be watched now."""
        return self if self.model is None else self.wrap(network_of(self.model)).with_weights(self.weights)

    def with_weights(self, weights: Sequence[Any]) -> "JaxNetwork":
        """Return the same with other weights, of the same shapes and dtypes."""
        return replace(self, weights=tuple(weights))

    def run(self, weights: Sequence[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool) -> Any:
        """Run it; an exception of its own is raised with the shapes of its input."""
        try:
            return self.function(weights, args, kwargs, training)
        except Exception as error:
            shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for _, x in tensors_with_paths((args, dict(kwargs))))
            error.add_note(f"while the model ran on an input of shape {shapes}")
            raise


def network_of(model: Any) -> JaxNetwork:
    """Return a user's model as a function of its weights.

    Raises:
        ModelError: a linen module without weights, a Keras model that is not built, or a module that cannot be split.
    """
    return model if isinstance(model, JaxNetwork) else replace(_network_of(model), model=model)


def _network_of(model: Any) -> JaxNetwork:
    owner = model.__self__ if inspect.ismethod(model) else model
    method = model.__name__ if inspect.ismethod(model) else "__call__"
    roots = roots_of(owner)
    if "keras" in roots:
        return _of_keras(model)
    if "flax" in roots:
        nnx, linen = sys.modules.get("flax.nnx"), sys.modules.get("flax.linen")
        if nnx is not None and isinstance(owner, nnx.Module):
            return _hashable(_of_nnx(nnx, owner, method))
        if linen is not None and isinstance(owner, linen.Module):
            return _hashable(_of_linen(owner, method))
    if "equinox" in roots:
        return _hashable(_of_equinox(owner, method))
    if isinstance(model, functools.partial):
        return _hashable(_of_partial(model))
    if "jaxlib" in roots:
        return JaxNetwork(_calling(model), key=("jit", id(model)), dies_with=(model,))
    return JaxNetwork(_calling(model))


def own_model(model: Any) -> Any:
    """Return the user's own model."""
    return model.model if isinstance(model, JaxNetwork) and model.model is not None else model


def _hashable(network: JaxNetwork) -> JaxNetwork:
    """Return a network whose key is hashed once, or without it where that cannot be one."""
    try:
        return replace(network, key=None if network.key is None else _HashedOnce(network.key, hash(network.key)))
    except TypeError:
        return replace(network, key=None)


@dataclass(frozen=True)
class _HashedOnce:
    """A key and its hash: that of a large module's definition takes milliseconds."""

    value: Hashable
    number: int

    def __hash__(self) -> int:
        return self.number


def _calling(model: Callable[..., Any]) -> Callable[..., Any]:
    return lambda weights, args, kwargs, training: model(*args, **kwargs)


def _of_nnx(nnx: Any, module: Any, method: str) -> JaxNetwork:
    try:
        definition, state = nnx.split(module)
    except ValueError as error:
        raise ModelError(f"the nnx module cannot be split into its structure and its state ({error})") from error
    weights, paths, structure = _flat(state)

    def function(weights: Sequence[Any], args: Any, kwargs: Any, training: bool) -> Any:
        # a copy, since the state of a norm or of a random generator would belong to another trace
        merged = nnx.merge(definition, jax.tree.unflatten(structure, weights), copy=True)
        return getattr(merged, method)(*args, **kwargs)

    return JaxNetwork(function, weights, paths, ("nnx", definition, structure, method), channels_last=True)


def _of_linen(module: Any, method: str) -> JaxNetwork:
    if module.scope is None:
        raise ModelError(
            f"the linen module {type(module).__name__} has no weights of its own; pass module.bind(variables), or "
            "(module, variables)"
        )
    module, variables = module.unbind()
    weights, paths, structure = _flat(variables)

    def function(weights: Sequence[Any], args: Any, kwargs: Any, training: bool) -> Any:
        return module.apply(jax.tree.unflatten(structure, weights), *args, method=method, **kwargs)

    paths = tuple(path.partition(".")[2] for path in paths)  # without the collection, "params" or "batch_stats"
    return JaxNetwork(function, weights, paths, ("linen", module, structure, method), channels_last=True)


def _of_equinox(module: Any, method: str) -> JaxNetwork:
    """Map a module over the batch, unless `eqx.filter_vmap` does so already."""
    leaves, structure = jax.tree.flatten(module)
    is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
    weights, paths = _arrays_with_paths(module)
    static = tuple(leaf for leaf, is_one in zip(leaves, is_array, strict=True) if not is_one)

    def function(weights: Sequence[Any], args: Any, kwargs: Any, training: bool) -> Any:
        arrays, others = iter(weights), iter(static)
        whole = [next(arrays) if is_one else next(others) for is_one in is_array]
        call = getattr(jax.tree.unflatten(structure, whole), method)
        return call(*args, **kwargs) if _is_mapped(module) else _mapped(call, args, kwargs)

    return JaxNetwork(function, weights, paths, ("equinox", structure, static, method), channels_last=False)


def _is_mapped(module: Any) -> bool:
    """Whether `eqx.filter_vmap` is among the wrappers of a module."""
    while hasattr(module, "__wrapped__"):
        if "Vmap" in type(module).__name__:
            return True
        module = module.__wrapped__
    return False


def _mapped(call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a function of one sample on each sample of the tensors among its arguments."""
    leaves, structure = jax.tree.flatten((args, dict(kwargs)))
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)]

    def of_sample(*samples: Any) -> Any:
        whole = list(leaves)
        for i, sample in zip(at, samples, strict=True):
            whole[i] = sample
        inner_args, inner_kwargs = jax.tree.unflatten(structure, whole)
        return call(*inner_args, **inner_kwargs)

    return jax.vmap(of_sample)(*(leaves[i] for i in at))


def _of_partial(model: Any) -> JaxNetwork:
    inner = _network_of(model.func) if "jaxlib" in roots_of(model.func) else None
    owner = getattr(model.func, "__self__", None)
    key: Hashable | None = None
    dies_with: tuple[Any, ...] = ()
    if inner is not None:
        key, dies_with = inner.key, inner.dies_with
    elif "flax" in roots_of(owner) and "flax.linen" in sys.modules:
        key = (owner, model.func.__name__) if isinstance(owner, sys.modules["flax.linen"].Module) else None
    leaves, structure = jax.tree.flatten((model.args, model.keywords))
    is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
    weights, paths = _arrays_with_paths(_only(model.args) if not model.keywords else (model.args, model.keywords))
    static = tuple(leaf for leaf, is_one in zip(leaves, is_array, strict=True) if not is_one)

    def function(weights: Sequence[Any], args: Any, kwargs: Any, training: bool) -> Any:
        arrays, others = iter(weights), iter(static)
        whole = [next(arrays) if is_one else next(others) for is_one in is_array]
        first, keywords = jax.tree.unflatten(structure, whole)
        return model.func(*first, *args, **{**keywords, **kwargs})

    key = None if key is None else ("partial", key, structure, static)
    return JaxNetwork(function, weights, paths, key, dies_with=dies_with)


def _only(values: tuple[Any, ...]) -> Any:
    return values[0] if len(values) == 1 else values


def _of_keras(model: Any) -> JaxNetwork:
    if not model.built:
        raise ModelError("the Keras model is not built; call it once on an input, or model.build(shape)")
    keras = sys.modules["keras"]
    trainable, others = list(model.trainable_variables), list(model.non_trainable_variables)
    weights = tuple(variable.value for variable in (*trainable, *others))
    paths = tuple(variable.path.replace("/", ".") for variable in (*trainable, *others))

    def function(weights: Sequence[Any], args: Any, kwargs: Any, training: bool) -> Any:
        split = weights[: len(trainable)], weights[len(trainable) :]
        if kwargs:
            args, kwargs = (dict(kwargs),), {}
        if len(args) > 1 and len(getattr(model, "inputs", None) or ()) == len(args):
            args = (list(args),)  # a functional model takes its inputs as one structure
        output, _ = model.stateless_call(*split, *args, training=training)
        return output

    attributes = _plain_attributes(model)
    last = keras.config.image_data_format() == "channels_last"
    return JaxNetwork(function, weights, paths, ("keras", id(model), attributes, paths), last, (model,))


def _plain_attributes(model: Any) -> tuple[Hashable, ...]:
    """Return all layers with their plain attributes and functions: `layer.activation = ...` makes another function."""
    attributes: list[Hashable] = []
    for layer in model._flatten_layers():
        attributes.append(id(layer))
        for name, value in vars(layer).items():
            if type(value) in _PLAIN_TYPES and name[0] != "_":
                attributes += name, value
            elif type(value) is types.FunctionType:
                attributes += name, weakref.ref(value)
    return tuple(attributes)


def _flat(tree: Any) -> tuple[tuple[Any, ...], tuple[str, ...], Any]:
    with_paths, structure = jax.tree.flatten_with_path(tree)
    return tuple(leaf for _, leaf in with_paths), tuple(dotted(path) for path, _ in with_paths), structure


def _arrays_with_paths(tree: Any) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    leaves, paths, _ = _flat(tree)
    kept = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)]
    return tuple(leaves[i] for i in kept), tuple(paths[i] for i in kept)
