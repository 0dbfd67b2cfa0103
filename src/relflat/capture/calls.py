"""What one forward pass leaves behind: the calls of the tapped layers, and how other tensors relate to them."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from relflat.capture.kinds import Kind
from relflat.errors import GraphError
from relflat.rng import RngState

# Ops that move or copy the values of a tensor without computing anything new.
_RELABELLING = (
    "_DDPSink",
    "Alias",
    "Clone",
    "Permute",
    "ReshapeAlias",
    "Squeeze",
    "T",
    "ToCopy",
    "Transpose",
    "Unsqueeze",
    "UnsafeView",
    "View",
)


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of a tapped layer within a forward pass.

    Attributes:
        layer: qualified name of the layer.
        module: the layer.
        kind: how that class of layer acts linearly.
        phi: its input, as the layer saw it.
        weight: its weight at that moment, as ``(d, m)``.
        output: the tensor it returned; may have been overwritten in place since.
        edge: where gradients with respect to the output are taken, valid even after in-place ops; None
            under ``no_grad``.
        versions: of input and output at that moment.
        tied: whether another module has the same weight.
    """

    layer: str
    module: nn.Module
    kind: Kind
    phi: Tensor
    weight: Tensor
    output: Tensor
    edge: GradientEdge | None
    versions: tuple[int, int]
    tied: bool = False

    def untouched(self) -> bool:
        """Whether the output still holds what the layer returned."""
        return self.output._version == self.versions[1]

    def outputs_last(self) -> Float[Tensor, "... d"]:
        """The output with its rows in the last dimension, a view."""
        return self.kind.outputs_last(self.module, self.output)

    def input(self) -> Tensor:
        """The input, after checking that nothing overwrote it since."""
        if self.phi._version != self.versions[0]:
            raise GraphError(
                f"the input of layer {self.layer!r} was modified in place after the layer read it; "
                "use the out-of-place form of that operation"
            )
        return self.phi


@dataclass(slots=True, eq=False)
class Forward:
    """What one forward pass of the model left: calls of tapped layers, tapped parameters, inputs, outputs.

    ``alone`` is false where the calls are of several passes.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rng: RngState | None = None
    calls: list[Call] = field(default_factory=list)
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    mode: int = 0
    outputs: Any = None
    grad: bool = True
    alone: bool = True


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether both read the same numbers in the same row-major order from the same memory."""
    if a.numel() != b.numel() or a.data_ptr() != b.data_ptr() or a.dtype != b.dtype:
        return False
    return (a.is_contiguous() and b.is_contiguous()) or (a.shape == b.shape and a.stride() == b.stride())


def same_values(call: Call, tensor: Float[Tensor, "..."], output: Float[Tensor, "..."]) -> bool:
    """Whether ``tensor`` is ``output``, reshaped, cast or copied but not computed upon.

    ``output`` is the output of the call, or a view of it with its dimensions in another order.

    Exact, not a comparison of numbers alone: either both share memory that nothing overwrote, or the
    autograd graph between them consists of copies only and the numbers stand in the same order.
    """
    if not call.untouched():
        return False
    if same_memory(tensor, output):
        return True
    if call.edge is None or tensor.grad_fn is None or tensor.numel() != call.output.numel():
        return False
    node: Node | None = tensor.grad_fn
    while node is not None and node is not call.edge.node:
        if node.name().rstrip("0123456789").removesuffix("Backward") not in _RELABELLING:
            return False
        node = node.next_functions[0][0]
    flat = output.detach().reshape(-1)
    return node is not None and torch.equal(tensor.detach().reshape(-1).to(flat.dtype), flat)


def depends_on(tensor: Tensor, calls: Sequence[Call]) -> list[Call]:
    """The calls whose outputs the tensor was computed from; one walk over its graph."""
    wanted = {c.edge.node: c for c in calls if c.edge is not None}
    found = [wanted[node] for node in ancestors(tensor.grad_fn) if node in wanted]
    return [c for c in calls if c in found]


def feeds_itself(calls: Sequence[Call]) -> bool:
    """Whether an input of the layer was computed from an earlier output of it, as in a recurrence."""
    return any(depends_on(later.phi, calls[:i]) for i, later in enumerate(calls) if i)


def ancestors(root: Node | None, without: Collection[Node] = ()) -> Iterator[Node]:
    """All nodes of the graph that a node leads to, itself included, but not past those ``without``."""
    seen, stack = {root, *without}, [root]
    while stack:
        node = stack.pop()
        if node is None:
            continue
        yield node
        for parent, _ in node.next_functions:
            if parent not in seen:
                seen.add(parent)
                stack.append(parent)
