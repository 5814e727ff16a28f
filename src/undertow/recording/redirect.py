"""`redirect`: change the gradient at the outputs of some modules, on its way back through the network."""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self, final

from ..display import brief
from ..errors import InputError
from ..frameworks.base import Redirector, bound, capability, framework_of

Change = Callable[[Any], Any]


@final
class redirect:
    """Change the gradient at modules' outputs while the context is open: what a function returns flows back instead.

    A function takes the gradient of the objective by a module's output, of that output's shape and dtype, once for each
    call of the module and each tensor that it returns, and returns one of the same shape and dtype. It acts on passes
    that run, forward and backward, inside the context and in the thread that opened it; a graph created inside and
    differentiated later is not changed. All hooks are removed at the end, also after an exception. In-place successors,
    reused modules and checkpointing (`use_reentrant=False`) make no difference. Contexts nest: where two have the same
    site, the outer's function comes first.

    The output of a module that returns its input (Identity, Dropout in evaluation) or a view of it (Flatten) is
    replaced by a copy, so that other readers of that input are not redirected. What a successor then writes into the
    copy in place does not reach that input.

    Args:
        model: an `nn.Module`, not compiled; a Keras model, or a Flax or Equinox module.
        sites: dotted names, or globs on them in which `*` also matches dots, each with its function. "" is the
            network's own output. A module that several keys match gets all their functions, in the order of the keys.

    Attributes:
        changed: how many gradients were changed so far, by the name of the site.

    Raises:
        InputError: a key matches no module, or, during `backward`, a function returned what does not fit.
        RuleError: at the end, when the network ran with gradients and none came back through any site.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
    >>> with redirect(net, {"1": redirect.zero()}) as redirected:
    ...     net(torch.ones(1, 2)).sum().backward()
    >>> net[0].weight.grad.abs().sum(), redirected.changed["1"]
    (tensor(0.), 1)
    """

    def __init__(self, model: Any, sites: Mapping[str, Change]) -> None:
        model = bound(model)
        self._redirected = _redirector(model).redirected(model, sites)

    def __enter__(self) -> Self:
        self._redirected.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._redirected.__exit__(kind, error, traceback)

    def __repr__(self) -> str:
        return f"redirect(changed={brief(self.changed)})"

    @property
    def changed(self) -> dict[str, int]:
        """How many gradients were changed so far, by the name of the site."""
        return dict(self._redirected.changed)

    @staticmethod
    def scale(factor: float) -> Change:
        """Return a function that multiplies the gradient; -1 reverses it.

        Source: gradient reversal, Ganin and Lempitsky 2015, arXiv 1409.7495.
        """
        return lambda g: g * factor

    @staticmethod
    def zero() -> Change:
        """Return a function that returns zeros, so that nothing flows back."""
        return lambda g: _redirector(g).zero(g)

    @staticmethod
    def clip(norm: float) -> Change:
        """Return a function that shortens each sample's gradient, `(B, ...)` along B, to an ℓ2 norm of at most `norm`.

        Raises:
            InputError: the norm is not positive.
        """
        if not norm > 0:
            raise InputError(f"norm is {norm}; it must be positive (redirect.zero() lets nothing flow on)")
        return lambda g: _redirector(g).clip(g, norm)

    @staticmethod
    def noise(std: float, seed: int = 0) -> Change:
        """Return a function that adds normal noise of standard deviation `std`, in the gradient's own unit.

        The function has its own generator, seeded with `seed`; the global random state is not changed.

        Source: Neelakantan et al. 2015, arXiv 1511.06807.

        Raises:
            InputError: the standard deviation is negative.
        """
        if not std >= 0:
            raise InputError(f"std is {std}; it must not be negative")
        functions: list[Change] = []  # the framework's, which the first gradient tells

        def noise(g: Any) -> Any:
            if not functions:
                functions.append(_redirector(g).noisy(std, seed))
            return functions[0](g)

        return noise


def _redirector(value: Any) -> Redirector:
    framework = framework_of(value)
    if framework is None:
        raise InputError(f"model is a {type(value).__name__}; redirect works at the parts of an nn.Module")
    return capability(framework, "inspect.redirect")
