"""What a graph node stands for in a rule that is a table, by its name: elementwise, a sum, a view, and so on."""

import re
from functools import lru_cache
from typing import Any

from ..internals import function_class
from ..nodes import NodeKind, classify

# Elementwise functions of one tensor; what they save of it.
_SMOOTH = (
    *("Gelu", "Silu", "Mish", "Elu", "Celu", "Softplus", "Hardswish", "Sigmoid", "Tanh", "Hardsigmoid", "LogSigmoid"),
    *("Hardshrink", "Softshrink", "Exp", "Expm1", "Log", "Log1P", "Sin", "Cos", "Erf", "Erfc", "Sqrt", "Rsqrt"),
    *("Reciprocal", "Pow", "Atan", "Sinh", "Cosh", "Asinh", "Clamp", "ClampMin", "ClampMax", "Hardtanh", "Threshold"),
)
SMOOTH = frozenset(_SMOOTH)
PROPORTIONAL = frozenset(("Relu", "Maximum", "LeakyRelu", "PreluKernel", "RreluWithNoise", "Abs", "Neg"))
"""f(x) / x is their derivative, so a rule that passes g·f(x)/x is the gradient."""
COPIES = frozenset(("ToCopy", "Clone", "Alias", "Copy", "CopyBackwards", "Detach", "NativeDropout", "Contiguous"))
VIEWS = frozenset(
    (
        *("View", "UnsafeView", "ReshapeAlias", "Reshape", "Transpose", "Permute", "T", "Expand", "Squeeze"),
        *("Slice", "Select", "Split", "SplitWithSizes", "Unbind", "Cat", "Stack", "AsStrided", "Index", "IndexSelect"),
        *("Gather", "Flip", "Roll", "ConstantPadNd", "ReflectionPad1D", "ReflectionPad2D", "ReplicationPad1D"),
        *("ReplicationPad2D", "Unfold", "Im2Col", "Col2Im", "PixelShuffle", "PixelUnshuffle", "Embedding", "Repeat"),
        *("Tril", "Triu", "Diagonal", "MaskedFill", "Movedim", "Chunk", "Swapaxes", "Take", "Where", "UnsafeSplit"),
        *("Narrow", "ChannelShuffle", "Tile", "Moveaxis", "Flatten", "Unflatten", "Zeros", "IndexPut", "CopySlices"),
        *("SqueezeMultiple", "Unsqueeze", "ExpandAs", "ViewAs", "Unsafe", "Scatter", "MaskedScatter", "MaskedSelect"),
        *("IndexFill", "SliceScatter", "SelectScatter", "DiagonalScatter", "ReflectionPad3D", "ReplicationPad3D"),
        *("ViewAsReal", "ViewAsComplex", "Real", "Imag", "Rot90"),
    )
)
PICKS = frozenset(("Max", "Min", "Amax", "Amin", "Sort", "Topk", "Kthvalue", "Median", "Cummax", "Cummin"))
"""What hands on some of its elements, by their values: the gradient is right, and zero for all others."""
SUMS = frozenset(
    (
        *("Add", "Sub", "Rsub", "Sum", "Mean", "Cumsum", "AvgPool1D", "AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D"),
        *("AdaptiveAvgPool3D", "UpsampleNearest1D", "UpsampleNearest2D", "UpsampleNearest3D", "UpsampleBilinear2D"),
        *("UpsampleBicubic2D", "UpsampleBilinear2DAa", "UpsampleBicubic2DAa", "UpsampleLinear1D", "MkldnnAvgPool2D"),
        *("UpsampleTrilinear3D", "UpsampleNearestExact1D", "UpsampleNearestExact2D", "UpsampleNearestExact3D"),
        *("IndexAdd", "ScatterAdd", "FftR2C", "FftC2R", "FftC2C", "Trace"),
        *("LinalgVectorNorm", "Norm", "Std"),  # in proportion to their input, as sums are
    )
)
REDUCTIONS = frozenset(
    ("Sum", "Mean", "Var", "Std", "VarMean", "StdMean", "LinalgVectorNorm", "Norm", "AvgPool2D", "AvgPool3D")
)
AFFINE = frozenset(("Add", "Sub", "Rsub", "Mul", "Div", "Neg"))
ELEMENTWISE = SMOOTH | PROPORTIONAL | COPIES | AFFINE


@lru_cache(maxsize=4096)
def _stem(name: str) -> str:
    plain = re.sub(r"Backward(AutogradNestedTensor)?\d*$", "", name.rpartition("::")[2])
    return "NativeBatchNorm" if plain.startswith("NativeBatchNormLegit") else plain  # as decompositions have it


def stem(node: Any) -> str:
    """Return a node's operation, as "Gelu" of GeluBackward0.

    >>> import torch
    >>> stem(torch.ones(1, requires_grad=True).exp().grad_fn)
    'Exp'
    """
    return "" if function_class(node) is not None else _stem(node.name())


def simple_kind(node: Any) -> str | None:
    """Return a node's kind in `undertow.tables.KINDS`; None where the operands on the way decide, or it has none."""
    name = stem(node)
    if name.startswith("ScaledDotProduct"):
        return "attention"
    if name in ("Softmax", "SafeSoftmax", "LogSoftmax"):
        return "softmax"
    if name in ("NativeLayerNorm", "NativeGroupNorm", "FusedRmsNorm") or name.endswith("BatchNorm"):
        return "norm"
    if name in ("Prelu", "PreluKernel", "Relu", "LeakyRelu", "RreluWithNoise", "Abs"):
        return "relu"
    if name == "Maximum":
        return "relu" if classify(node) is NodeKind.RELU else None
    if name in SMOOTH:
        return "relu" if classify(node) is NodeKind.RELU else "smooth"
    if classify(node) is NodeKind.SWITCH:
        return "pool"
    return None
