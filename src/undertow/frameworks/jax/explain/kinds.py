"""What an operation of a jaxpr does under a rule that is a table, by the name of its primitive."""

from ..graph import PASSING

SMOOTH = frozenset(
    (
        *("tanh", "logistic", "exp", "exp2", "expm1", "log", "log1p", "sin", "cos", "tan", "asin", "acos", "atan"),
        *("sinh", "cosh", "asinh", "acosh", "atanh", "erf", "erfc", "erf_inv", "sqrt", "rsqrt", "cbrt", "square"),
        *("integer_pow", "lgamma", "digamma"),
    )
)
"""Elementwise functions of one operand."""
BOUNDS = frozenset(("max", "min", "clamp"))
AFFINE = frozenset(("add", "sub", "add_any", "mul", "div", "neg"))
COPIES = frozenset(
    (
        *("convert_element_type", "reduce_precision", "copy", "copy_p", "name", "optimization_barrier", "pvary"),
        *("pcast", "pbroadcast", "sharding_constraint", "device_put", "layout_constraint", "reshard"),
    )
)
VIEWS = frozenset(
    (
        *(*PASSING, "transpose", "rev", "slice", "dynamic_slice", "gather", "concatenate", "pad", "split", "tile"),
        *("dynamic_update_slice", "scatter", "select_n", "real", "imag", "complex", "conj", "stack", "unstack"),
    )
)
PICKS = frozenset(("reduce_max", "reduce_min", "sort", "top_k", "cummax", "cummin"))
"""What hands on some of its elements, by their values: the gradient is right, and zero for all others."""
SUMS = frozenset(
    (
        *("add", "sub", "add_any", "neg", "reduce_sum", "reduce_window_sum", "cumsum", "scatter-add", "scatter-sub"),
        *("scatter_add", "scatter_sub", "fft", "psum"),
    )
)
REDUCTIONS = frozenset(("reduce_sum", "reduce_window_sum"))
ELEMENTWISE = SMOOTH | BOUNDS | AFFINE | COPIES | {"abs", "select_n", "pow"}
GATES = frozenset(("logistic", "sigmoid", "hard_sigmoid", "softmax"))
ACTIVATIONS = frozenset(
    (
        *("relu", "relu6", "leaky_relu", "prelu", "gelu", "silu", "mish", "elu", "celu", "selu", "softplus", "tanh"),
        *("hard_silu", "hard_tanh", "squareplus"),
    )
)
