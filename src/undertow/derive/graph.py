"""A graph through which a gradient flows back from E: what neurons and blocks of a model have in common."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from ..frameworks.results import END as END
from .notation import Partial, Quantity
from .packages import need


class Graph(ABC):
    """Nodes, and who reads them. A node that E is computed from has `END` among its readers."""

    @property
    @abstractmethod
    def readers(self) -> Mapping[str, Sequence[str]]:
        """For each node those that read it, in the order in which their edges were given."""

    @property
    @abstractmethod
    def order(self) -> Sequence[str]:
        """All nodes, each after those that it reads."""

    @abstractmethod
    def quantity(self, node: str) -> Quantity:
        """How a node is written."""

    @abstractmethod
    def delta_name(self, node: str) -> Quantity:
        """How ∂E/∂node is written where it is used more than once."""

    @abstractmethod
    def partial(self, reader: str, node: str) -> Partial:
        """Return ∂reader/∂node, or the direct ∂E/∂node where the reader is `END`."""

    @cached_property
    def fan_in(self) -> Mapping[str, int]:
        """How many nodes use each node's gradient: those that it reads."""
        return Counter(reader for readers in self.readers.values() for reader in readers)

    def downstream(self, nodes: Iterable[str]) -> list[str]:
        """Return these nodes and all that depend on them, those nearest to E first."""
        stack = list(nodes)
        seen = set(stack)
        while stack:
            for reader in self.readers[stack.pop()]:
                if reader != END and reader not in seen:
                    seen.add(reader)
                    stack.append(reader)
        return [node for node in reversed(self.order) if node in seen]

    @cached_property
    def _deltas(self) -> dict[tuple[str, bool], Any]:
        return {}

    def delta(self, node: str, substituted: bool) -> Any:
        """Return ∂E/∂node in SymPy; what several expressions share is one object in all of them."""
        deltas = self._deltas
        if (node, substituted) not in deltas:
            for dependent in self.downstream([node]):
                if (dependent, substituted) not in deltas:
                    deltas[dependent, substituted] = self._delta(dependent, substituted)
        return deltas[node, substituted]

    def delta_factors(self, node: str, substituted: bool) -> Sequence[Any]:
        """Return the factors of ∂E/∂node in SymPy; a product used once is opened: a chain is one flat product."""
        delta = self.delta(node, substituted)
        return delta.args if delta.is_Mul and self.fan_in[node] <= 1 else (delta,)

    def _delta(self, node: str, substituted: bool) -> Any:
        terms = []
        for reader in self.readers[node]:
            factors = [factor.symbol() for factor in self.partial(reader, node).factors(substituted)]
            if reader != END:
                factors = [*self.delta_factors(reader, substituted), *factors]
            terms.append(sympy_product(factors))
        return sympy_sum(terms)


def sympy_product(factors: Sequence[Any]) -> Any:
    """Multiply in SymPy, and let it do nothing about it."""
    return factors[0] if len(factors) == 1 else need("sympy").Mul(*factors, evaluate=False)


def sympy_sum(terms: Sequence[Any]) -> Any:
    """Add in SymPy, and let it do nothing about it."""
    return terms[0] if len(terms) == 1 else need("sympy").Add(*terms, evaluate=False)
