"""A graph that a gradient flows back through from E: the common part of networks of neurons and blocks of models."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from ..display import Shown
from ..frameworks.results import END as END
from .notation import Partial, Quantity
from .packages import need


class Graph(Shown):
    """Nodes and their readers. A node that E is computed from has `END` among its readers."""

    @property
    @abstractmethod
    def readers(self) -> Mapping[str, Sequence[str]]:
        """For each node the nodes that read it, in the order of the edges."""

    @property
    @abstractmethod
    def order(self) -> Sequence[str]:
        """All nodes in topological order: each after those that it reads."""

    @abstractmethod
    def quantity(self, node: str) -> Quantity:
        """Return the symbol of a node."""

    @abstractmethod
    def delta_name(self, node: str) -> Quantity:
        """Return the name of ∂E/∂node where it is used more than once."""

    @abstractmethod
    def partial(self, reader: str, node: str) -> Partial:
        """Return ∂reader/∂node, or the direct ∂E/∂node if the reader is `END`."""

    @cached_property
    def fan_in(self) -> Mapping[str, int]:
        """For each node the number of nodes that it reads; each of them uses its gradient."""
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
        """Return ∂E/∂node in SymPy; expressions that share it hold the same object."""
        deltas = self._deltas
        if (node, substituted) not in deltas:
            for dependent in self.downstream([node]):
                if (dependent, substituted) not in deltas:
                    deltas[dependent, substituted] = self._delta(dependent, substituted)
        return deltas[node, substituted]

    def delta_factors(self, node: str, substituted: bool) -> Sequence[Any]:
        """Return ∂E/∂node as factors in SymPy; a product used once is opened, so that a chain is one flat product."""
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
    """Multiply in SymPy without simplifying."""
    return factors[0] if len(factors) == 1 else need("sympy").Mul(*factors, evaluate=False)


def sympy_sum(terms: Sequence[Any]) -> Any:
    """Add in SymPy without simplifying."""
    return terms[0] if len(terms) == 1 else need("sympy").Add(*terms, evaluate=False)
