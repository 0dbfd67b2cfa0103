"""The autograd graph behind a tensor: names of operations, where they lead, which compute nothing or are linear."""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

# Operations that keep row-major order, that move dimensions, and that leave rows out; none computes a new value.
_VIEWS = ("ReshapeAlias", "Squeeze", "UnsafeView", "Unsqueeze", "View")
KEEPING = ("_DDPSink", "Alias", "Clone", "ToCopy", *_VIEWS)
MOVING = ("Permute", "T", "Transpose")
SELECTING = ("Index", "IndexSelect", "Select", "Slice")

_LINEAR = {
    *(*KEEPING, *MOVING, *SELECTING, "Add", "Sub", "Rsub", "Neg", "Sum", "Mean", "Expand", "Cat", "Stack", "Split"),
    *("SplitWithSizes", "Unbind", "Gather", "ConstantPadNd", "AvgPool2D", "AdaptiveAvgPool2D", "AvgPool3D"),
    *("UpsampleNearest2D", "UpsampleBilinear2D", "Relu", "LeakyRelu", "Hardtanh", "Threshold", "Abs", "ClampMin"),
    *("Clamp", "MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D", "MaskedFill", "Where", "Squeeze"),
}
"""Linear in all their inputs together, on either side of a kink."""

_PRODUCTS = {"Mul", "Mm", "Bmm", "Mv", "Addmm", "Baddbmm", "Convolution", "Div", "NativeBatchNorm", "PreluKernel"}
"""Linear in each of some inputs alone."""


def operation(node: Any) -> str:
    """Name of a node's operation, such as ``"LogSoftmax"`` for ``<LogSoftmaxBackward0>``."""
    return node.name().rstrip("0123456789").removesuffix("Backward")


def signed(number: int) -> int:
    """A saved signed integer, which autograd shows as an unsigned one."""
    return number - 2**64 if number >= 2**63 else number


def follow(node: Node | None, through: Sequence[str], until: Node | None = None) -> Any:
    """Follow first parents while the operations are among ``through``; where that ends."""
    while node is not None and node is not until and operation(node) in through:
        node = node.next_functions[0][0]
    return node


def ancestors(
    root: Node | list[Node | None] | None,
    without: Collection[Node | None] = (),
    past: Callable[[Node], bool] | None = None,
) -> Iterator[Node]:
    """All nodes of the graph that a node, or some, lead to, itself included, but nothing of those ``without``.

    Where ``past`` says no the way ends, with the node that was asked about.
    """
    stack = [*root] if isinstance(root, list) else [root]
    seen = {*stack, *without}
    while stack:
        node = stack.pop()
        if node is None:
            continue
        yield node
        if past is not None and not past(node):
            continue
        for parent, _ in node.next_functions:
            if parent not in seen:
                seen.add(parent)
                stack.append(parent)


def in_order(root: Node | None, without: Collection[Node] = ()) -> list[Node]:
    """As :func:`ancestors`, each after those it was computed from."""
    order: list[Node] = []
    seen = set(without)
    stack: list[tuple[Node | None, bool]] = [(root, False)]
    while stack:
        node, left = stack.pop()
        if node is not None and left:
            order.append(node)
        elif node is not None and node not in seen:
            seen.add(node)
            stack += [(node, True), *((parent, False) for parent, _ in node.next_functions)]
    return order


_TELLING = ("training", "dim", "dims", "dim0", "dim1", "pad", "normalized_shape")
"""What operations save that says where samples go in them."""


@functools.cache
def _read_of(kind: type) -> tuple[tuple[str, ...], bool]:
    """Which of that operations of a class save; and whether they are views, which save what shape was given them."""
    names = tuple(f"_saved_{name}" for name in _TELLING if hasattr(kind, f"_saved_{name}"))
    return names, kind.__name__ in ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")  # nested: others


def fingerprint(root: Node | None, marks: Mapping[Node, str], n: int) -> int:
    """The same for graphs of the same operations, joined alike, marked at the same places, for batches of any size.

    Of the shapes between two views only tells which sizes are multiples of ``n``, the number of samples: where
    samples may be. Cost: less than a microsecond an operation.
    """
    numbers: dict[Any, int] = {None: -1, root: 0}
    stack, read = [] if root is None else [root], list[Any]()
    while stack:  # written out for speed, as this is done in every step that has a penalty
        node: Any = stack.pop()
        names, shapes = _read_of(type(node))  # type: ignore[arg-type]  # which it takes for unhashable
        read.append(type(node))
        if names:
            read += [getattr(node, name) for name in names]
        if shapes:
            read += [size % n == 0 for size in node._saved_self_sym_sizes]
        for parent, _ in node.next_functions:
            if parent in numbers:
                read.append(numbers[parent])
            else:  # what is met first is numbered in order
                numbers[parent] = len(numbers)
                stack.append(parent)
    return hash((*read, *((numbers.get(node), mark) for node, mark in marks.items())))


def foreign(node: Any) -> bool:
    """Whether the derivative is somebody's own code, which may itself be differentiated wrongly."""
    if operation(node) == "_DDPSink":
        return False
    return isinstance(node, torch.autograd.function.BackwardCFunction) or "CppNode" in node.name()


def singular(node: Any) -> bool:
    """Whether higher derivatives of the operation may be no numbers where the first is one: norms and roots at 0."""
    name = operation(node)
    if name == "Pow":  # integers are smooth
        exponent = getattr(node, "_saved_exponent", 2)
        return isinstance(exponent, Tensor) or float(exponent) not in (0.0, 1.0, 2.0, 3.0, 4.0)
    return name in ("Acos", "Asin", "Atan2", "Cdist", "EuclideanDist", "LinalgVectorNorm", "Norm", "Sqrt", "Std")


def leaves_between(root: Node | None, ends: Collection[Node]) -> list[Tensor]:
    """Parameters that ``root`` was computed from after the ``ends`` only, not before them too."""
    before = {node for end in ends for node in ancestors(end)}
    found = (node for node in ancestors(root, without=ends) if node not in before)
    return [node.variable for node in found if hasattr(node, "variable")]


def hold_back(root: Node | None, beyond: Collection[Node], *, unless: Tensor) -> None:
    """Have nothing but zeros leave the graph of ``root`` for nodes ``beyond`` and for leaves, unless that is true.

    Also where something in it is no number: those times zero are none either, so they are replaced as they leave.
    """

    def replaced(out: Sequence[Tensor | None], given: Any) -> tuple[Tensor | None, ...]:
        return tuple(None if g is None else torch.where(unless.to(g.device), g, 0.0) for g in out)

    for node in ancestors(root, without=beyond):
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        if any(parent in beyond or not parent.next_functions for parent in parents):
            node.register_hook(replaced)


class Use(NamedTuple):
    """One place where a node's output goes: the node that takes it, as which input, and which output it is."""

    node: Any
    position: int
    of: Any
    number: int


def users(root: Node | None) -> dict[Node, list[Use]]:
    """Of every node that a node leads to: where its outputs go."""
    found: dict[Node, list[Use]] = {}
    for node in ancestors(root):
        for position, (parent, number) in enumerate(node.next_functions):
            if parent is not None:
                found.setdefault(parent, []).append(Use(node, position, parent, number))
    return found


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether both read the same numbers in the same row-major order from the same memory."""
    if a is b or not a.numel():
        return a is b  # none has memory of its own
    if a.numel() != b.numel() or a.data_ptr() != b.data_ptr() or a.dtype != b.dtype:
        return False
    return (a.is_contiguous() and b.is_contiguous()) or (a.shape == b.shape and a.stride() == b.stride())


def piecewise_linear(root: Node | None, ends: Collection[Node]) -> bool:
    """Whether what ``root`` computes is piecewise linear in what the nodes ``ends`` gave, other inputs constant.

    Hessian and Gauss-Newton matrix are one there.
    """
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
