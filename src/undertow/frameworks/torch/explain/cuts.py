"""Why an explanation has no gradient, or one that is no number: the model runs once more, watched module by module."""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ....errors import InputError, ModelError
from ....structures import tensors_with_paths
from ...base import Request
from ..calls import eager, module_of, run, scores_of, uncompiled
from ..heads import run_to_scores
from ..submodules import named_modules
from ..targets import target_scores

_CUDNN = "cudnn RNN backward can only be called in training mode"
_CUTS = "no_grad, detach, .item(), quantised weights or whole numbers"


@contextmanager
def cudnn_errors_named() -> Iterator[None]:
    """Say what to do about a cuDNN recurrent layer, which has no backward in eval mode.

    Raises:
        ModelError: instead of its own error.
    """
    try:
        yield
    except RuntimeError as error:
        if _CUDNN not in str(error):
            raise
        raise ModelError(
            "cuDNN gives a recurrent layer no gradient in eval mode; explain inside `with "
            "torch.backends.cudnn.flags(enabled=False):`, which runs it without cuDNN"
        ) from error


def where_cut(request: Request, fed: Sequence[Tensor]) -> str:
    """Say in which module the gradient ends."""
    root, cut = module_of(uncompiled(request.model)), list[str]()

    def after(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        inputs = [t for _, t in tensors_with_paths((args, kwargs)) if t.requires_grad]
        outputs = [t for _, t in tensors_with_paths(output)]
        if inputs and outputs and not _passes(inputs, outputs):
            cut.append(name)

    with ExitStack() as stack:
        for name, module in () if root is None else named_modules(root):
            if not isinstance(module, torch.jit.ScriptModule):
                hook = module.register_forward_hook(partial(after, name), with_kwargs=True)
                stack.callback(hook.remove)
        run(request.bind(eager(request.model)), _again(fed))
    where = f"in {cut[0]!r}" if cut and cut[0] else "in the model's own forward"
    return f"it ends {where} ({_CUTS})"


def _passes(inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Whether a gradient comes from outputs to inputs: an operation without a backward may still ask for one."""
    asking = [t for t in outputs if t.requires_grad]
    if not asking:
        return False
    gradients = torch.autograd.grad(
        asking, inputs, [torch.ones_like(t) for t in asking], retain_graph=True, allow_unused=True
    )
    return any(g is not None for g in gradients)


def without_gradient(request: Request, fed: Sequence[Tensor], i: int) -> str:
    """Say why an input has no gradient: because the scores do not change with it, or because the gradient is cut."""
    moved = [x + 1 if j == i else x for j, x in enumerate(fed)]
    with torch.no_grad():
        before, after = (scores_of(run(request.bind(eager(request.model)), x), request.output) for x in (fed, moved))
    if torch.equal(before, after):
        remedy = "name a layer on the way to them" if request.noun else "bind it, as with functools.partial"
        return f"{request.describe(i)} does not influence the scores; {remedy}"
    return f"the gradient of the scores does not reach {request.describe(i)}: {where_cut(request, fed)}"


def no_gradient(request: Request, fed: Sequence[Tensor]) -> InputError:
    """Return the error for scores that no gradient leads to."""
    return InputError(f"the scores do not depend on {request.noun or 'x'} by any gradient: {where_cut(request, fed)}")


def nan_gradient(request: Request, fed: Sequence[Tensor]) -> ModelError:
    """Return the error for a gradient that is no number."""
    return ModelError(
        f"the scores are finite and their gradient is NaN, first at {first_nan(request, fed)}; look for a root, "
        "a norm or a logarithm at zero there"
    )


def first_nan(request: Request, fed: Sequence[Tensor]) -> str:
    """Name the first graph node whose backward makes NaN."""
    was_on = torch.is_anomaly_enabled()
    torch.autograd.set_detect_anomaly(True)
    try:
        inputs = _again(fed)
        output, path, _ = run_to_scores(request, inputs)
        scores, _, _ = target_scores(output, request.target, request.batch, path)
        torch.autograd.grad(scores.sum(), [x for x in inputs if x.requires_grad], allow_unused=True)
    except RuntimeError as error:
        name = re.search(r"Function '(\w+)' returned nan", str(error))
        return name[1] if name else "some operation"
    finally:
        torch.autograd.set_detect_anomaly(was_on)
    return f"the rule {request.rule_name!r}"


def _again(fed: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().clone().requires_grad_(x.is_floating_point()) for x in fed]
