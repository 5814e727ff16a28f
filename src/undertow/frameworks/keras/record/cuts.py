"""Why no gradient reached a layer's output: what was seen of the operations behind it."""

from collections.abc import Sequence

from .op_graph import SeenOp, SeenTensor, before, behind

FROZEN, OFF_THE_TAPE, UNREAD = "frozen", "off the tape", "unread"
_COMPARISONS = ("Greater", "GreaterEqual", "Less", "LessEqual", "Equal", "NotEqual")
_IGNORED = ("Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike")
_METHODS = {"StopGradient": "tf.stop_gradient", "ArgMax": "argmax", "ArgMin": "argmin", "Cast": "a cast"}


def why_none(tensor: SeenTensor, roots: Sequence[SeenTensor]) -> str:
    """Return the reason, as the table `diagnosis` has it.

    Args:
        roots: what gradients were asked of.
    """
    if tensor in roots or any(y in roots for op in behind(tensor) if op.carries for y in op.outputs):
        return OFF_THE_TAPE if _is_trained(tensor) else FROZEN
    cut = _cut(tensor, roots)
    return UNREAD if cut is None else f"{_named(cut)} in {place(cut)}"


def _is_trained(tensor: SeenTensor) -> bool:
    """Whether a layer that it was computed by, or the layer that gave it, has weights that learn."""
    return any(op.call is not None and op.call.layer.trainable_variables for op in before(tensor))


def _cut(tensor: SeenTensor, roots: Sequence[SeenTensor]) -> SeenOp | None:
    """Return the first operation without a gradient on a way from a tensor, rather one that leads to a root."""
    cuts = [op for op in behind(tensor) if not op.carries and op.type not in _IGNORED]
    leading = [op for op in cuts if any(_leads_to(y, roots) for y in op.outputs)]
    explicit = [op for op in cuts if op.type == "StopGradient"]
    return next(iter([*leading, *explicit]), None)


def _leads_to(tensor: SeenTensor, roots: Sequence[SeenTensor]) -> bool:
    return tensor in roots or any(y in roots for op in behind(tensor, only_carrying=False) for y in op.outputs)


def _named(op: SeenOp) -> str:
    if op.type in _COMPARISONS:
        return f"a comparison ({op.name})"
    return _METHODS.get(op.type, op.name)


def flat_behind(tensor: SeenTensor) -> str:
    """Return what makes the gradient of a tensor zero wherever it leads; empty where nothing is known."""
    op = next((op for op in behind(tensor) if op.type == "Sign"), None)
    return "" if op is None else f"{op.name} in {place(op)}"


def place(op: SeenOp) -> str:
    """Return where an operation ran, for a sentence."""
    if op.call is None:
        return "what follows the network"
    return op.call.name or "the call of the network itself"
