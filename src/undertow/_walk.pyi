from collections.abc import Callable
from typing import Any

Memory = memoryview | bytearray
Reduced = tuple[Memory, float, float, float, float, int, Memory | None]
Counted = tuple[Memory, Memory]

def reduce(values: Any, rows: int, sums: bool, threads: int) -> Reduced: ...
def count(values: Any, tables: Any) -> Counted: ...
def hook(how: tuple[Any, ...], facts: Any, module: Any, single: int, most: int) -> Callable[[Any], None]: ...
