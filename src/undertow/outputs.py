"""What a model returns: one tensor, or several in tuples, mappings and objects, and which of them holds the scores."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from .errors import InputError, ModelError, did_you_mean
from .structures import is_tensor

Path = str | int | Sequence[str | int]


def head_of(output: Any, path: Path | None = None) -> Any:
    """Return the part of a model's output that holds its scores.

    Args:
        output: as the model returned it.
        path: a name, an index, or several, outermost first; "a.b" is ("a", "b"). None takes `.logits` or ["logits"]
            where there is one, else the first of a tuple or list.

    Raises:
        ModelError: there is no such part.
        InputError: the path is empty.

    >>> head_of({"hidden": 1, "logits": 2}), head_of((1, {"a": 3}), "1.a")
    (2, 3)
    """
    if path is not None:
        for key in _keys(path):
            output = _part(output, key)
        return output
    if isinstance(output, Mapping):
        return output.get("logits", output)
    output = getattr(output, "logits", output)
    return output[0] if isinstance(output, tuple | list) and output else output


def described(output: Any) -> str:
    """Say what a model returned, by its class and the parts of it: "a dict of hidden, logits".

    >>> described({"hidden": 1, "logits": 2}), described([1, 2])
    ('a dict of hidden, logits', 'a list of 2')
    """
    kind = type(output).__name__
    article = "an" if kind[0] in "AEIOUaeiou" else "a"
    if isinstance(output, tuple | list):
        return f"{article} {kind} of {len(output)}"
    names = [str(name) for name in (output if isinstance(output, Mapping) else getattr(output, "__dict__", ()))]
    return f"{article} {kind}{' of ' * bool(names)}{', '.join(names[:8])}"


def with_inputs(target: Any, x: Any) -> Any:
    """Return a target as a function of the output alone, where it is a function of the output and of `x`."""
    if not callable(target):
        return target
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return target
    required = [
        p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
    return partial(_apply, target, x) if len(required) == 2 else target


def _apply(target: Callable[[Any, Any], Any], x: Any, output: Any) -> Any:
    return target(output, x)


def _keys(path: Path) -> list[str | int]:
    words = path.split(".") if isinstance(path, str) else [path] if isinstance(path, int) else list(path)
    if not words or "" in words:
        raise InputError(f"output={path!r} names no part of the output; write a name or an index, as in 'logits' or 1")
    return [int(word) if isinstance(word, str) and word.removeprefix("-").isdecimal() else word for word in words]


def _part(output: Any, key: str | int) -> Any:
    if isinstance(output, Mapping):
        names = [str(name) for name in output]
        if key in output:
            return output[key]
    elif isinstance(output, tuple | list) and isinstance(key, int):
        names = [f"0 to {len(output) - 1}"] if output else []
        if -len(output) <= key < len(output):
            return output[key]
    else:
        names = [name for name in getattr(output, "__dict__", ()) if name[0] != "_" and not is_tensor(output)]
        if isinstance(key, str) and not is_tensor(output) and hasattr(output, key):
            return getattr(output, key)
    there = f"; it has {', '.join(names[:8])}" if names else "; it is one tensor, so leave output= out"
    raise ModelError(f"the model's output has no part {key!r}{did_you_mean(str(key), names) or there}")
