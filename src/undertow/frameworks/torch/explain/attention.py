"""Maps of attention layers, read off the graph of one call: rollout, and attention times its gradient.

A fused kernel keeps no weights: they are computed again from the queries and keys that its node saved, with its scale,
mask and causality. Of attention written out the softmax's own result is read.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ....errors import InputError, RuleError
from ....layouts import find_layout, upsampled
from ....tables import AttentionRule
from ...base import Request
from ..arrays import like, to_numpy
from ..calls import eager
from ..internals import saved, sequence_number
from ..nodes import NodeKind, name_of
from .graph import RuleAttachment
from .kinds import COPIES, VIEWS, stem
from .notes import Read, SavedTensors
from .recognition import MATRIX_PRODUCTS, Way

_SOFTMAX = ("Softmax", "SafeSoftmax")


@dataclass(eq=False)
class _Layer:
    """One attention layer of the call.

    Attributes:
        node: the fused kernel's, or the softmax's.
        mean: of the heads, `(B, N, N)`: weights, or weights times their gradients where both are positive.
        is_read: which tokens' outputs the explained scores read, `(B, N)`.
    """

    node: Any
    mean: Tensor | None = field(default=None, repr=False)
    is_read: Tensor | None = field(default=None, repr=False)


@final
class AttentionReader(RuleAttachment):
    """Reads the weights of the attention layers on the way, and the gradients that arrive there."""

    reads_every_node = True

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        assert isinstance(request.rule, AttentionRule)
        self.network = eager(request.model)
        self.rule = request.rule
        self._layers: list[_Layer] = []
        self._handles: list[Any] = []
        self._saved = SavedTensors()

    def __exit__(self, *_: object) -> None:
        self._saved.clear()
        for handle in self._handles:
            handle.remove()
        self._layers.clear()

    def attach(self, node: Node, kind: NodeKind) -> bool:
        """Act on no activation."""
        return False

    def attach_all(self, nodes: Collection[tuple[Node, NodeKind]]) -> None:
        """Only refuse what cannot be seen into."""
        self.refuse_hidden(nodes)

    def attach_operations(self, nodes: Collection[Any]) -> None:
        """Hook the attention layers, in the order in which they ran.

        Raises:
            RuleError: there is none, or a softmax among them is something else.
        """
        found = sorted(_attention_nodes(nodes, self.rule.name), key=sequence_number)
        if not found:
            raise RuleError(
                f"rule {self.rule.name!r} found no attention between the input and the scores; rule='attnlrp' and "
                "'gradient' need none"
            )
        self._layers = [_Layer(node) for node in found]
        self._handles = [layer.node.register_prehook(partial(self._read, layer)) for layer in self._layers]
        self.stats.rewired = len(found)

    def _read(self, layer: _Layer, gradients: Sequence[Tensor | None]) -> None:
        g = gradients[0]
        if g is None:
            return
        read = self._saved.read
        with torch.no_grad():
            weights, g = _weights(layer.node, read), _wide(g)
            if g.ndim != weights.ndim or g.shape[:-1] != weights.shape[:-1]:
                raise self._not_over_tokens(layer, weights)
            layer.is_read = _per_head(g, self._batch(layer, weights)).ne(0).any(-1).any(1)
            if self.rule.by_gradient:
                by_weight = g if stem(layer.node) in _SOFTMAX else g @ _heads(layer.node, "value", g.shape[1], read).mT
                weights = (weights * by_weight).clamp(min=0)
            layer.mean = _per_head(weights, self._batch(layer, weights)).mean(1)

    def _batch(self, layer: _Layer, weights: Tensor) -> int:
        """Return how many samples the weights `(B, heads, N, N)`, or `(B * heads, N, N)`, are of."""
        batch: int = self.samples
        if weights.ndim not in (3, 4) or weights.shape[-1] != weights.shape[-2]:
            raise self._not_over_tokens(layer, weights)
        if (len(weights) != batch) if weights.ndim == 4 else (len(weights) % batch):
            raise self._not_over_tokens(layer, weights)
        return batch

    samples = 0
    """How many samples the scores are of; set before the first backward pass."""

    def _not_over_tokens(self, layer: _Layer, weights: Tensor) -> RuleError:
        return RuleError(
            f"rule {self.rule.name!r} needs layers that attend from all tokens to all tokens; {name_of(layer.node)} "
            f"has weights {tuple(weights.shape)} for {self.samples} sample(s), as in windows or across two sequences; "
            "take rule='attnlrp'"
        )

    def maps(self, inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Return the map of the scores that have just gone back, over each input: `(B, N, 1)` or `(B, 1, H, W)`.

        Raises:
            RuleError: the layers are not over the same tokens.
            InputError: the tokens have no place in any input.
        """
        relevance = self._relevance()
        laid = tuple(_laid(relevance, x) for x in inputs)
        if all(values is None for values in laid):
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
            raise InputError(
                f"attention is over {relevance.shape[1]} tokens, which have no place in x of {shapes}: take images "
                "(B, C, H, W), or at= the output of the layer that embeds tokens, (B, tokens, features)"
            )
        return laid

    def _relevance(self) -> Tensor:
        """Multiply the layers' matrices from the rows that the scores read, down to the first: `(B, N)`."""
        rows: Tensor | None = None
        for layer in reversed(self._layers):
            if layer.mean is None or layer.is_read is None:
                continue
            if rows is None:
                read = layer.is_read.to(layer.mean.dtype)
                rows = read / read.sum(1, keepdim=True).clamp(min=1)
            if rows.shape[1] != layer.mean.shape[1]:
                raise RuleError(
                    f"rule {self.rule.name!r}: attention is over {layer.mean.shape[1]} tokens in one layer and over "
                    f"{rows.shape[1]} in another; take rule='attnlrp'"
                )
            passed = (rows.unsqueeze(1) @ layer.mean).squeeze(1)
            rows = rows + passed if self.rule.by_gradient else (rows + passed) / 2
        if rows is None:
            raise RuleError(f"rule {self.rule.name!r}: no gradient of the score reaches an attention layer")
        for layer in self._layers:
            layer.mean = layer.is_read = None
        return rows


def _attention_nodes(nodes: Collection[Any], rule: str) -> list[Any]:
    """Return the fused attention nodes, and the softmaxes whose result weighs values in a matrix product.

    Raises:
        RuleError: a softmax's result goes elsewhere.
    """
    way = Way(nodes)
    fused = [node for node in nodes if stem(node).startswith("ScaledDotProduct")]
    weighing = {
        behind
        for node in nodes
        if stem(node) in MATRIX_PRODUCTS
        for _, edge in way.inputs(node)
        if stem(behind := way.through(edge, VIEWS | COPIES)[0]) in _SOFTMAX
    }
    others = [node for node in nodes if stem(node) in _SOFTMAX and node not in weighing]
    if others and (fused or weighing):
        raise RuleError(
            f"rule {rule!r} cannot tell what {name_of(others[0])} x{len(others)} does beside the attention: its result "
            "weighs no values; take rule='attnlrp'"
        )
    return [*fused, *weighing]


def _weights(node: Any, read: Read) -> Tensor:
    """Return an attention node's weights: kept by a softmax, or computed again."""
    if stem(node) in _SOFTMAX:
        result: Tensor = read(node, "result")
        return _wide(result)
    q = _wide(read(node, "query"))
    k = _heads(node, "key", q.shape[1], read)
    scale = saved(node, "scale")
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    mask = next(
        (read(node, name) for name in ("attn_mask", "attn_bias") if hasattr(type(node), f"_saved_{name}")), None
    )
    if mask is not None:
        mask = mask.detach()
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    if saved(node, "is_causal"):
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    weights: Tensor = scores.softmax(-1).nan_to_num(0)  # of a row that is masked whole
    return weights


def _heads(node: Any, name: str, count: int, read: Read) -> Tensor:
    """Return keys or values, each head as often as queries share it."""
    x = _wide(read(node, name))
    return x if x.ndim < 4 or x.shape[1] == count else x.repeat_interleave(count // x.shape[1], 1)


def _wide(x: Tensor) -> Tensor:
    """Return a tensor detached, and no narrower than float32."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _per_head(x: Tensor, batch: int) -> Tensor:
    return x.reshape(batch, -1, *x.shape[-2:])


def _laid(relevance: Tensor, x: Tensor) -> Tensor | None:
    """Lay tokens' relevance over an input; None where they have no place in it.

    Raises:
        InputError: `x` is images over which the tokens make no grid.
    """
    batch, count = relevance.shape
    if x.ndim == 3 and tuple(x.shape[:2]) == (batch, count):
        return relevance.unsqueeze(-1).to(x.dtype)
    if x.ndim != 4:
        return None
    array = to_numpy(relevance.unsqueeze(-1))
    layout = find_layout("attention", array.shape, tuple(x.shape), -1)
    return like(upsampled(layout.channels_first(array), tuple(x.shape[2:])), x)
