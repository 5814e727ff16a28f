"""Tensors nested in tuples, lists and mappings: what models take and return, taken apart and put together again."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any


def is_tensor(value: Any) -> bool:
    """Whether a value is an array of NumPy or a tensor of any framework."""
    return hasattr(type(value), "shape") and hasattr(type(value), "dtype")


def tensors_with_paths(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the tensors in a structure, however deep, with their paths: "" for one alone, "0", "text.mask".

    >>> import numpy as np
    >>> [path for path, _ in tensors_with_paths({"a": np.ones(2), "b": [None, np.ones(1)]})]
    ['a', 'b.1']
    """
    if is_tensor(value):
        yield path, value
        return
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, tuple | list) else ()
    for key, item in items:
        yield from tensors_with_paths(item, f"{path}.{key}" if path else str(key))


def map_tensors(value: Any, change: Callable[[Any], Any], others: Callable[[Any], Any] = lambda value: value) -> Any:
    """Return a structure with its tensors changed, in order, and `others` of its other leaves.

    >>> import numpy as np
    >>> map_tensors((np.ones(2), [3]), lambda t: t.sum().item(), others=lambda _: None)
    (2.0, [None])
    """
    if is_tensor(value):
        return change(value)
    if isinstance(value, Mapping):
        items = {key: map_tensors(item, change, others) for key, item in value.items()}
        try:
            return type(value)(items)  # type: ignore[call-arg]
        except TypeError:
            return items
    if isinstance(value, tuple | list):
        parts = [map_tensors(item, change, others) for item in value]
        make = getattr(value, "_make", type(value))  # of a namedtuple, such as PackedSequence
        return make(parts)
    return others(value)
