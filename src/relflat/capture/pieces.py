"""Where a network is piecewise linear: Hessian and Gauss-Newton matrix are one there."""

from collections.abc import Collection
from typing import Any

from torch.autograd.graph import Node

from relflat.capture.graph import KEEPING, MOVING, SELECTING, in_order, operation

_LINEAR = {
    *(*KEEPING, *MOVING, *SELECTING, "Add", "Sub", "Rsub", "Neg", "Sum", "Mean", "Expand", "Cat", "Stack", "Split"),
    *("SplitWithSizes", "Unbind", "Gather", "ConstantPadNd", "AvgPool2D", "AdaptiveAvgPool2D", "AvgPool3D"),
    *("UpsampleNearest2D", "UpsampleBilinear2D", "Relu", "LeakyRelu", "Hardtanh", "Threshold", "Abs", "ClampMin"),
    *("Clamp", "MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D", "MaskedFill", "Where", "Squeeze"),
}
"""Linear in all their inputs together, on either side of a kink."""

_PRODUCTS = {"Mul", "Mm", "Bmm", "Mv", "Addmm", "Baddbmm", "Convolution", "Div", "NativeBatchNorm", "PreluKernel"}
"""Linear in each of some inputs alone."""


def piecewise_linear(root: Node | None, ends: Collection[Node]) -> bool:
    """Whether what ``root`` computes is piecewise linear in what the nodes ``ends`` gave, other inputs constant."""
    moved = set(ends)
    for node in in_order(root, without=ends):
        inputs = [i for i, (parent, _) in enumerate(node.next_functions) if parent in moved]
        if inputs:
            moved.add(node)
            if not _linear(node, inputs):
                return False
    return True


def _linear(node: Any, inputs: list[int]) -> bool:
    """Whether an operation is linear in some of its inputs."""
    name = operation(node)
    if name in _LINEAR:
        return True
    if name not in _PRODUCTS or len(inputs) != 1:
        return False
    if name == "NativeBatchNorm":  # with running statistics
        return inputs == [0] and not node._saved_training
    return inputs == [0] if name in ("Div", "PreluKernel") else True
