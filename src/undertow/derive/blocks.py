"""A model as a graph of blocks, recorded from one pass: the chain rule over it, and the gradient on each edge."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, final

from ..display import FrozenRows, Part, Pictures, ShownTable, brief, counted
from ..errors import InputError, did_you_mean
from ..frameworks.base import capability, framework_of_input
from ..frameworks.results import Block, Carried
from ..show.graph import draw_blocks
from ..show.labels import drawn
from ..show.plots import as_image
from .chain import MAX_EDGES_DRAWN, Derivative, DifferentiableGraph
from .graph import END
from .notation import Partial, Quantity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# in LaTeX's text; names of modules may hold anything but a dot
_ESCAPED = {letter: f"\\{letter}" for letter in "_#$%&{}"} | {"\\": r"\backslash ", "^": r"\hat{}", "~": r"\sim "}


@final
@dataclass(frozen=True, eq=False, repr=False)
class Blocks(DifferentiableGraph):
    """The module calls of one pass as blocks, with an edge wherever a gradient flows from one to another.

    Attributes:
        blocks: in order of execution, the inputs first; each with the ℓ2 norm of the gradient at its outputs.
        edges: (source, target, norm): ℓ2 norm of the gradient that the target sends back to the source, whose output
            it reads; "E" is the objective.
        passed_on: calls that returned their input, such as an Identity. They are not blocks: the gradient passes them
            unchanged.
    """

    blocks: tuple[Block, ...]
    edges: tuple[Carried, ...]
    passed_on: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("blocks", "edges", "passed_on"):
            object.__setattr__(self, name, FrozenRows(getattr(self, name)))  # tuples that show themselves, however long

    @cached_property
    def readers(self) -> Mapping[str, Sequence[str]]:
        """For each block the blocks that read its output; `END` is the objective."""
        readers: dict[str, list[str]] = {block.name: [] for block in self.blocks}
        for edge in self.edges:
            readers[edge.source].append(edge.target)
        return readers

    @cached_property
    def order(self) -> Sequence[str]:
        """The blocks' names, each after those that it reads."""
        return [block.name for block in self.blocks]

    @cached_property
    def carried(self) -> Mapping[tuple[str, str], float]:
        """The ℓ2 norm of the gradient on each edge (source, target)."""
        return {(edge.source, edge.target): edge.norm for edge in self.edges}

    def quantity(self, node: str) -> Quantity:
        """Return the symbol of a block; its name is in brackets unless it is an identifier."""
        escaped = "".join(_ESCAPED.get(letter, letter) for letter in node)
        return Quantity(node if node.isidentifier() else f"({node.strip('()')})", rf"\mathrm{{{escaped}}}", False)

    def delta_name(self, node: str) -> Quantity:
        """Return the name of ∂E/∂node where it is used more than once: δ(name)."""
        quantity = self.quantity(node)
        return Quantity(f"δ({quantity.text.strip('()')})", rf"\delta_{{{quantity.latex}}}", False)

    def partial(self, reader: str, node: str) -> Partial:
        """Return the Jacobian ∂reader/∂node along this edge alone, or the direct ∂E/∂node if the reader is `END`."""
        if reader == END:
            has_other_readers = list(self.readers[node]) != [END]
            return Partial(Quantity("E", "E", False), self.quantity(node), direct=has_other_readers)
        return Partial(self.quantity(reader), self.quantity(node))

    def derivative(self, wrt: str, substitute: bool = False) -> Derivative:
        """Return ∂E/∂(the outputs of a block) by the chain rule: a row of partials times Jacobian matrices.

        Args:
            wrt: a block's name, or "x" for the input.
            substitute: must be False; Jacobians of blocks have no closed form here.

        Raises:
            InputError: no block has this name, or `substitute` is True.
        """
        if substitute:
            raise InputError("Jacobians of blocks have no closed form; substitute is for networks of neurons")
        if wrt not in self.readers:
            raise InputError(f"there is no block {wrt!r}{self._hint(wrt)}")
        return Derivative(self, wrt, self.quantity(wrt), ((wrt, None),))

    def check(self, derivative: Derivative, seed: int) -> float:
        """Return the largest relative difference of the edges' summed gradients to autograd's, over all blocks used."""
        differences = {block.name: block.difference for block in self.blocks}
        return max(differences[node] for node, _ in derivative.carrying)

    def figure(self, derivative: Derivative | None, title: str) -> "Figure":
        """Draw the blocks, with the edges of a derivative highlighted; see `Derivative.plot`."""
        heading = title or (drawn(f"∂E/∂{derivative.wrt.text}") if derivative else "")
        return draw_blocks([*self.order, END], self.carried, derivative.carrying if derivative else (), heading)

    def _shown(self) -> Iterator[Part]:
        yield f"{counted(len(self.blocks), 'block')} and {counted(len(self.edges), 'edge')} of one pass"
        if self.passed_on:
            yield f"passed on unchanged: {brief(self.passed_on)}"
        rows = ((b.name, b.kind, f"{b.gradient:.4g}", ", ".join(self.readers[b.name])) for b in self.blocks)
        yield ShownTable(("block", "kind", "|gradient|", "read by"), rows, len(self.blocks))
        if len(self.edges) <= MAX_EDGES_DRAWN:
            yield Pictures(lambda: [("", as_image(self.figure(None, ""), 80))])

    def _hint(self, wrt: str) -> str:
        if wrt in self.passed_on:
            return ": it returned its input unchanged, so its gradient is its input's"
        calls = [name for name in self.readers if name.startswith(f"{wrt}#")]
        if calls:
            return f": it was called {len(calls)} times; use {' or '.join(calls[:4])}"
        if any(name.startswith(f"{wrt}.") for name in self.readers):
            return f" at this depth; its submodules are blocks: {', '.join(n for n in self.order if n.startswith(wrt))}"
        if any(wrt.startswith(f"{name}.") for name in self.readers):
            return " at this depth; a greater depth would show it"
        return did_you_mean(wrt, self.readers) or f"; there are {', '.join(self.order[:12])}"


def from_model(model: Any, x: Any, depth: int = 1, target: Any = None) -> Blocks:
    """Run one pass of a model and return it as a graph of blocks.

    A block is a module call at this depth of nesting, or a shallower call that calls no other module; a module called
    several times has the blocks "name#0", "name#1", ... An operation in a forward itself is a block, such as
    "layer1.0.add", if it joins several blocks (residual additions, concatenations) or if several read it; otherwise it
    belongs to the block that reads it. The model, its mode, buffers, hooks and gradients, and the random state are
    left unchanged.

    Args:
        model: an `nn.Module`, or a `keras.Model` on TensorFlow or torch.
        x: a batch, `(B, ...)`, or a tuple of them.
        depth: 1 for the model's direct submodules, 2 for theirs, and so on.
        target: the score that E sums over the batch: a class, one class per sample, or a function of the output that
            returns `(B,)`, as in `undertow.explain`; by default each sample's predicted class.

    Raises:
        InputError: an argument that cannot be used.
        ModelError: a compiled, scripted or reentrantly checkpointed submodule, whose operations cannot be recorded.
        TargetError: a class that does not exist.

    >>> import torch
    >>> class Residual(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.enter, self.bend, self.head = (torch.nn.Linear(3, 3) for _ in range(3))
    ...     def forward(self, x):
    ...         h = self.enter(x)
    ...         return self.head(h + self.bend(h).relu())
    >>> blocks = from_model(Residual(), torch.ones(2, 3))
    >>> print(blocks.derivative("enter").text)
    ∂E/∂enter = δ(add) · ∂add/∂bend · ∂bend/∂enter + δ(add) · ∂add/∂enter
      where δ(add) = ∂E/∂add = ∂E/∂head · ∂head/∂add
    """
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise InputError(f"depth {depth!r} is not a nesting depth; pass 1, 2, ...")
    inputs = x if isinstance(x, tuple) else (x,)
    if not inputs:
        raise InputError("x is an empty tuple; pass a batch, or a tuple of batches")
    reader = capability(framework_of_input(inputs[0], model), "inspect.blocks")
    graph = reader.block_graph(model, inputs, depth, target)
    return Blocks(graph.blocks, graph.edges, graph.passed_on)
