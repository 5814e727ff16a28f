"""One backward pass: Captum's Saliency, InputXGradient, GuidedBackprop and Deconvolution."""

from typing import Any

from .arguments import Tensors, as_tuple, like
from .method import Method, gradients


class Saliency(Method):
    """The gradient at the input, or its magnitude.

    Source: Simonyan et al. 2013, arXiv 1312.6034.
    """

    def attribute(
        self, inputs: Tensors, target: Any = None, abs: bool = True, additional_forward_args: Any = None
    ) -> Any:
        """Return the gradients, one like each input.

        Args:
            inputs: a floating-point batch `(B, ...)`, or a tuple of them, passed as `forward_func(*inputs)`.
            target: None for one score a sample; an int; a tuple of positions behind the batch axis; a tensor or list
                of B integers; a list of B tuples.
            abs: return magnitudes.
            additional_forward_args: one argument or a tuple of them, passed behind the inputs.

        Raises:
            TargetError: the target does not fit. InputError: an input without a gradient. ModelError: dropout or batch
                norm in training act.
        """
        maps = gradients(self.forward_func, as_tuple(inputs), target, additional_forward_args)
        return like(inputs, tuple(m.abs() for m in maps) if abs else maps)


class InputXGradient(Method):
    """The gradient times the input. Source: Shrikumar et al. 2016, arXiv 1605.01713."""

    @property
    def multiplies_by_inputs(self) -> bool:
        """True."""
        return True

    def attribute(self, inputs: Tensors, target: Any = None, additional_forward_args: Any = None) -> Any:
        """Return gradient times input, one like each input; arguments as of `Saliency.attribute`."""
        given = as_tuple(inputs)
        maps = gradients(self.forward_func, given, target, additional_forward_args)
        return like(inputs, tuple(x.detach() * m for x, m in zip(given, maps, strict=True)))


class ByRule(Method):
    """A gradient that a rule changes at activations."""

    rule = "gradient"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.model = model

    def attribute(self, inputs: Tensors, target: Any = None, additional_forward_args: Any = None) -> Any:
        """Return the gradients under the rule, one like each input; arguments as of `Saliency.attribute`.

        Raises:
            RuleError: there is no activation to which the rule applies, or one that cannot be seen into.
        """
        return like(inputs, gradients(self.forward_func, as_tuple(inputs), target, additional_forward_args, self.rule))


class GuidedBackprop(ByRule):
    """Guided backpropagation: positive gradients pass a ReLU where its input was positive.

    At every ReLU, ReLU6, LeakyReLU and clamp, module or function, reused or in place.

    Source: Springenberg et al. 2014, arXiv 1412.6806.
    """

    rule = "guided"


class Deconvolution(ByRule):
    """A deconvnet: positive gradients pass a ReLU, whatever its input was.

    Source: Zeiler and Fergus 2013, arXiv 1311.2901.
    """

    rule = "deconvnet"
