"""Hooks that do not keep a model from being copied or saved while they are on it."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any


class ModuleHook:
    """A hook on a module. Where the module is copied or pickled, the copy gets a hook that does nothing.

    That hook is `nullcontext().__exit__`: it takes any arguments and returns None, which changes nothing, and it can be
    unpickled where undertow is not installed.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")
