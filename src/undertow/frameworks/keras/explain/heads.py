"""The last operation of a classifier, such as a softmax, and the scores before it, in the graph of one call."""

from typing import Any

from .gradients import FUNCTION_CALLS, inlined

_NAMES = {"Softmax": "softmax", "LogSoftmax": "log-softmax", "Sigmoid": "sigmoid"}
_THAT_PASS = ("Identity", "Cast", "Log")


def before_head(scores: Any) -> tuple[Any, str]:
    """Return the scores before the last operation and its name, "softmax" or the like; as they are and "" without one.

    A logarithm, a copy or another dtype after it does not count. The body of a called function is copied, in sight.
    """
    tensor = scores
    while tensor.op.type in (*_THAT_PASS, *FUNCTION_CALLS):
        if tensor.op.type in _THAT_PASS:
            tensor = tensor.op.inputs[0]
        else:
            _, outputs, _ = inlined(tensor.op)
            tensor = outputs[tensor.value_index]
    name = _NAMES.get(tensor.op.type, "")
    return (tensor.op.inputs[0], name) if name else (scores, "")
