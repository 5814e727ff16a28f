"""Which operation an autograd graph node stands for, by its name; and all nodes behind one that matter to a rule."""

import enum
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.graph import Node

from .internals import function_class, saved


class NodeKind(enum.Enum):
    """What a node stands for, as far as a rule is concerned."""

    RELU = "a ReLU-like activation"
    SMOOTH = "a smooth activation, rewired only with activations='all'"
    OTHER = "an elementwise activation that no rule touches"
    HIDDEN = "a node that holds a computation which cannot be seen into"
    OPAQUE = "a user's own autograd.Function"
    SWITCH = "max-pooling: which of its inputs won is all that deconvnet keeps of a photograph"


SMOOTH = ("Gelu", "Silu", "Mish", "Elu", "Celu", "Softplus", "Hardswish")
_MAX_POOLS = (("", "WithIndices"), ("Adaptive", ""), ("Fractional", ""), ("Mkldnn", ""))
_KINDS = {
    **dict.fromkeys(("Relu", "Hardtanh", "LeakyRelu", "PreluKernel", "RreluWithNoise", "Threshold"), NodeKind.RELU),
    **dict.fromkeys(SMOOTH, NodeKind.SMOOTH),
    **dict.fromkeys(
        (f"{kind}MaxPool{n}D{how}" for n in (2, 3) for kind, how in _MAX_POOLS),
        NodeKind.SWITCH,
    ),
    **dict.fromkeys(
        ("Sigmoid", "Tanh", "Hardsigmoid", "LogSigmoid", "Glu", "Hardshrink", "Softshrink"), NodeKind.OTHER
    ),
}
_BATCH_NORMS = frozenset(f"{kind}BatchNormBackward0" for kind in ("Native", "Cudnn", "Miopen"))
_CLASSIFIED_BY_SAVED = frozenset(("Clamp", "ClampMin", "Maximum", "CopySlices", "CudnnRnn", "Where"))

HIDDEN = {
    "Checkpoint": "reentrant checkpointing runs a part of the network in a graph of its own; "
    "pass use_reentrant=False to torch.utils.checkpoint, or switch checkpointing off",
    "CompiledFunction": "a compiled call is one fused node with no activation in it; "
    "explain the module or function that was given to torch.compile",
    "DifferentiableGraph": "TorchScript has fused a part of the network into one node; "
    "explain the Python module that was scripted",
    "CopySlices": "an activation was applied in place to a view, which autograd folds into one node; "
    "write it out of place, as in x = x.relu()",
    "WhereBackward0": "torch.where chooses between a value and a function of it, as a decomposed PReLU does; "
    "explain the module before run_decompositions(), or write the activation as one",
    "CudnnRnn": "a cuDNN recurrent layer holds its ReLUs inside one node; "
    "run it under torch.backends.cudnn.flags(enabled=False)",
}

_KIND_OF_TYPE: dict[type, NodeKind | None] = {}  # of C++ nodes, whose types are built in and few


def name_of(node: Node) -> str:
    """Return a node's name for messages: of its C++ class, or of its autograd.Function."""
    function = function_class(node)
    if function is not None:
        return function.__name__
    return node.name().rpartition("::")[2]


def nodes_behind(root: Node) -> Iterator[tuple[Node, NodeKind]]:
    """Yield `root` and every node behind it that has a kind, each once."""
    for node in all_nodes_behind(root):
        kind = _KIND_OF_TYPE.get(type(node), NodeKind.OPAQUE)
        if kind is NodeKind.OPAQUE:
            kind = classify(node)
        if kind is not None:
            yield node, kind


def uses_batch_statistics(node: Node) -> bool:
    """Whether a node is a batch norm that took the batch's own statistics and holds those of its training."""
    is_norm = type(node).__name__ in _BATCH_NORMS
    return is_norm and saved(node, "training") and saved(node, "running_mean") is not None


def normalizes_by_batch(node: Node) -> bool:
    """Whether a batch norm's node took the statistics of what it was given, and not those of its training."""
    return hasattr(type(node), "_saved_training") and bool(saved(node, "training"))


def all_nodes_behind(root: Node) -> Iterator[Node]:
    """Yield `root` and every node behind it, each once."""
    seen = {root}
    stack = [root]
    while stack:
        node = stack.pop()
        yield node
        for behind, _ in node.next_functions:
            if behind is not None and behind not in seen:
                seen.add(behind)
                stack.append(behind)


def hidden_reason(node: Node) -> str:
    """Say why a hidden node cannot be seen into, and what to do."""
    name = name_of(node)
    return next(reason for part, reason in HIDDEN.items() if part in name)


def classify(node: Node) -> NodeKind | None:
    name = name_of(node)
    if function_class(node) is not None:  # a class made in Python, which `_KIND_OF_TYPE` must not keep alive
        return NodeKind.HIDDEN if any(part in name for part in HIDDEN) else NodeKind.OPAQUE
    if "DifferentiableGraph" in name:
        return NodeKind.HIDDEN
    if type(node).__name__ == "CppFunction":
        return NodeKind.OPAQUE if "CppNode" in node.name() else None
    stem = re.sub(r"Backward\d*$", "", name)
    if stem in _CLASSIFIED_BY_SAVED:
        return _classify_by_saved(stem, node)
    return _KIND_OF_TYPE.setdefault(type(node), _KINDS.get(stem))


def _classify_by_saved(stem: str, node: Any) -> NodeKind | None:
    """Return the kind of a node whose name alone does not tell, by its saved values and its inputs."""
    if stem == "CopySlices":  # two inputs: an assignment; one: some in-place call, see `calls.overwrites_a_view`
        return NodeKind.HIDDEN if len(node.next_functions) == 1 else None
    if stem == "CudnnRnn":
        return NodeKind.HIDDEN if saved(node, "mode") == 0 else None
    if stem == "Where":
        return NodeKind.HIDDEN if _chooses_a_function_of_the_other(node) else None
    if stem == "Maximum":
        constants = [i for i, (behind, _) in enumerate(node.next_functions) if behind is None]
        operands = (saved(node, "self"), saved(node, "other"))
        return NodeKind.RELU if constants and not operands[constants[0]].any() else None
    return NodeKind.RELU if _is_zero(saved(node, "min")) else NodeKind.OTHER


def _chooses_a_function_of_the_other(node: Node) -> bool:
    """Whether one of a choice's two branches is what the other is computed from in one step, times a slope perhaps."""
    first, second = (behind for behind, _ in node.next_functions)
    if first is None or second is None:
        return False
    return any(behind is a for a, b in ((first, second), (second, first)) for behind, _ in b.next_functions)


def _is_zero(bound: Any) -> bool:
    return bound is not None and not (bound.any() if isinstance(bound, torch.Tensor) else bound)
