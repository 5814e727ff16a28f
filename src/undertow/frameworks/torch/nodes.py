"""What a node of the autograd graph is, by its name, and the walk that finds the ones a rule cares about."""

import enum
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.graph import Node


class Kind(enum.Enum):
    """What a node did in the forward pass, as far as a rule is concerned."""

    RELU = "a ReLU-like activation"
    SMOOTH = "a smooth activation, rewired only with activations='all'"
    OTHER = "an elementwise activation that no rule touches"
    HIDDEN = "a node that holds a computation which cannot be seen into"
    OPAQUE = "somebody's own autograd.Function"
    SWITCH = "max-pooling: which of its inputs won is all that deconvnet keeps of a photograph"


SMOOTH = ("Gelu", "Silu", "Mish", "Elu", "Celu", "Softplus", "Hardswish")
_MAX_POOLS = (("", "WithIndices"), ("Adaptive", ""), ("Fractional", ""), ("Mkldnn", ""))
_KINDS = {
    **dict.fromkeys(("Relu", "Hardtanh", "LeakyRelu", "PreluKernel", "RreluWithNoise", "Threshold"), Kind.RELU),
    **dict.fromkeys(SMOOTH, Kind.SMOOTH),
    **dict.fromkeys(
        (f"{kind}MaxPool{n}D{how}" for n in (2, 3) for kind, how in _MAX_POOLS),
        Kind.SWITCH,
    ),
    **dict.fromkeys(("Sigmoid", "Tanh", "Hardsigmoid", "LogSigmoid", "Glu", "Hardshrink", "Softshrink"), Kind.OTHER),
}
_JUDGED_ONE_BY_ONE = frozenset(("Clamp", "ClampMin", "Maximum", "CopySlices", "CudnnRnn"))

HIDDEN = {
    "Checkpoint": "reentrant checkpointing runs a part of the network in a graph of its own; "
    "pass use_reentrant=False to torch.utils.checkpoint, or switch checkpointing off",
    "CompiledFunction": "a compiled call is one fused node with no activation in it; "
    "explain the module or function that was given to torch.compile",
    "DifferentiableGraph": "TorchScript has fused a part of the network into one node; "
    "explain the Python module that was scripted",
    "CopySlices": "an activation was applied in place to a view, which autograd folds into one node; "
    "write it out of place, as in x = x.relu()",
    "CudnnRnn": "a cuDNN recurrent layer holds its ReLUs inside one node; "
    "run it under torch.backends.cudnn.flags(enabled=False)",
}

_known: dict[type, Kind | None] = {}  # by the type of a C++ node: those types are built in and few


def name_of(node: Node) -> str:
    """Return what a node is called in reports: its class, or the user's autograd.Function."""
    forward = getattr(type(node), "_forward_cls", None)
    if forward is not None:
        return str(forward.__name__)
    return node.name().rpartition("::")[2]


def walk(root: Node) -> Iterator[tuple[Node, Kind]]:
    """Yield every node behind `root` that is of some kind, each once."""
    seen = {root}
    stack = [root]
    while stack:
        node = stack.pop()
        kind = _known.get(type(node), Kind.OPAQUE)
        if kind is Kind.OPAQUE:
            kind = _classify(node)
        if kind is not None:
            yield node, kind
        for behind, _ in node.next_functions:
            if behind is not None and behind not in seen:
                seen.add(behind)
                stack.append(behind)


def hidden_reason(node: Node) -> str:
    """Say why a hidden node cannot be seen into, and what to do."""
    name = name_of(node)
    return next(reason for part, reason in HIDDEN.items() if part in name)


def _classify(node: Node) -> Kind | None:
    name = name_of(node)
    if isinstance(node, torch.autograd.function.BackwardCFunction):  # Python: its class must not be kept alive
        return Kind.HIDDEN if any(part in name for part in HIDDEN) else Kind.OPAQUE
    if "DifferentiableGraph" in name:
        return Kind.HIDDEN
    if type(node).__name__ == "CppFunction":
        return Kind.OPAQUE if "CppNode" in node.name() else None
    stem = re.sub(r"Backward\d*$", "", name)
    if stem in _JUDGED_ONE_BY_ONE:
        return _judge(stem, node)
    return _known.setdefault(type(node), _KINDS.get(stem))


def _judge(stem: str, node: Any) -> Kind | None:
    """Judge by what the node saved where the name alone does not tell."""
    if stem == "CopySlices":  # two inputs: an assignment; one: any in-place call, decided by watching the forward
        return Kind.HIDDEN if len(node.next_functions) == 1 else None
    if stem == "CudnnRnn":
        return Kind.HIDDEN if node._saved_mode == 0 else None
    if stem == "Maximum":
        constants = [i for i, (behind, _) in enumerate(node.next_functions) if behind is None]
        saved = (node._saved_self, node._saved_other)
        return Kind.RELU if constants and not saved[constants[0]].any() else None
    return Kind.RELU if _is_zero(node._saved_min) else Kind.OTHER


def _is_zero(bound: Any) -> bool:
    return bound is not None and not (bound.any() if isinstance(bound, torch.Tensor) else bound)
