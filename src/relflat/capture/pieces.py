"""Where a network is piecewise linear: Hessian and Gauss-Newton matrix are one there."""

from collections.abc import Collection
from typing import Any

from torch.autograd.graph import Node

from relflat.capture.graph import KEEPING, MOVING, SELECTING, ancestors, operation

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
    order, moved = list(ancestors(root, without=ends)), set(ends)
    users: dict[Node, list[Node]] = {}
    for node in order:
        for parent, _ in node.next_functions:
            if parent is not None:
                users.setdefault(parent, []).append(node)
    new = list(moved)
    while new:
        new = [user for node in new for user in users.get(node, ()) if user not in moved]
        moved.update(new)
    return all(_linear(node, moved) for node in order if node in moved and node not in ends)


def _linear(node: Any, moved: Collection[Node]) -> bool:
    """Whether an operation is linear in its inputs among those ``moved``."""
    name, inputs = operation(node), [i for i, (parent, _) in enumerate(node.next_functions) if parent in moved]
    if name in _LINEAR:
        return True
    if name not in _PRODUCTS or len(inputs) != 1:
        return False
    if name == "NativeBatchNorm":  # with running statistics
        return inputs == [0] and not node._saved_training
    return inputs == [0] if name in ("Div", "PreluKernel") else True
