"""What there is to record in a network: its modules in the order in which they run, and what tells it from others."""

import hashlib
import math
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...base import NamedModule
from ..arrays import to_numpy
from ..calls import watched
from ..graph import graph_of
from ..marks import OUTPUT, outputs_marked
from ..models import JaxNetwork, network_of, own_model
from ..modules import TRACE, library_of
from ..modules import named_modules as modules_of
from ..perturbing import PerturbedGraph, marked_place
from .places import named_places

_frozen: ContextVar[bool] = ContextVar("undertow_frozen", default=False)


@contextmanager
def frozen() -> Any:
    """Inside, a network counts as one in evaluation: a run of it is only continued with the same weights."""
    token = _frozen.set(True)
    try:
        yield
    finally:
        _frozen.reset(token)


def named_modules(model: Any) -> list[NamedModule]:
    """List what can be a site: modules, and the places that Flax's name themselves, by `perturb` and `sow`."""
    named = modules_of(model)
    taken = {name for module in named for name in module.names}
    return named + [place for place in named_places(model) if taken.isdisjoint(place.names)]


def names_of(model: Any) -> dict[str, str]:
    """Return for each name of a module that can be a site its first one."""
    return {name: named.name for named in named_modules(model) for name in named.names}


def visits(model: Any, example: Any) -> dict[str, list[Any]]:
    """Trace the network on an example; return the output shapes of each module that was called, in order."""
    inputs = tuple(map(jnp.asarray, example if isinstance(example, tuple) else (example,)))
    with watched(model, names_of(model), outputs_marked):
        network = network_of(model).anew()
        whole = jax.make_jaxpr(lambda weights, *x: network.with_weights(weights)(*x))(network.weights, *inputs)
    graph = PerturbedGraph(graph_of(whole), placed(names_of(model), backward=False))
    shapes: dict[str, dict[str, list[tuple[int, ...]]]] = {}
    for place, shape in zip(graph.places, graph.shapes, strict=True):
        own = shape.shape[len(place.loops) :]
        calls = [own] * math.prod(loop.length for loop in place.loops)
        shapes.setdefault(place.site, {}).setdefault(place.position, []).extend(calls)
    return {
        site: [one[0] if len(one) == 1 else one for one in zip(*by_position.values(), strict=False)]
        for site, by_position in shapes.items()
    }


def identity(model: Any) -> dict[str, Any]:
    """Return what identifies a network: its class, the hashes of its structure and its weights, its precision."""
    named, cls = modules_of(model), type(own_model(model))
    digest = hashlib.sha256()
    for module in named:
        digest.update(f"{module.name}\0{module.types[0]}\0".encode())
    network = JaxNetwork(model) if library_of(model) == TRACE else network_of(model)
    weights = hashlib.sha256()
    arrays = {path: _numbers(weight) for path, weight in zip(network.paths, network.weights, strict=True)}
    for path, array in sorted(arrays.items()):
        line = f"{path}\0{array.shape}\0{array.dtype}\0".encode()
        digest.update(line)
        weights.update(line + np.ascontiguousarray(array).tobytes())
    return {
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "structure_sha256": digest.hexdigest(),
        "weights_sha256": weights.hexdigest(),
        "mode": "evaluation" if _frozen.get() else "training",
        "parameters": sum(array.size for array in arrays.values()),
        "precision": ", ".join(sorted({str(array.dtype) for array in arrays.values()})),
        "device": str(jax.devices()[0]),
        "framework": f"jax {jax.__version__}",
    }


def _numbers(weight: Any) -> Any:
    if jnp.issubdtype(weight.dtype, jax.dtypes.prng_key):
        weight = jax.random.key_data(weight)
    return to_numpy(weight)


def placed(names: Mapping[str, str], backward: bool) -> Callable[[Any], Any]:
    """Return what finds the marks of some sites, by their first names; where no gradient is asked for, a sown value
    is as good as any.
    """
    wanted = set(names.values())

    def place(node: Any) -> Any:
        found = marked_place(node)
        if found is None or found.site not in wanted:
            return None
        return found if backward else replace(found, role=OUTPUT)

    return place
