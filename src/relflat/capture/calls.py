"""What a forward pass leaves behind: the calls of the tapped layers, and what was computed from them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from relflat.capture.graph import KEEPING, MOVING, ancestors, follow, same_memory
from relflat.capture.kinds import Kind
from relflat.errors import GraphError
from relflat.rng import RngState


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of a tapped layer within a forward pass: input, output and weight as they were at that moment.

    Attributes:
        weight: as ``(d, m)``.
        output: the tensor it returned; may have been overwritten in place since.
        edge: where gradients in the output are taken, valid also after in-place operations; None under ``no_grad``.
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

    @property
    def samples(self) -> int:
        """How many samples the call saw; one if it had no batch dimension."""
        last = self.outputs_last()
        return last.shape[0] if last.ndim > 1 else 1

    def untouched(self) -> bool:
        """Whether the output still holds what the layer returned."""
        return self.output._version == self.versions[1]

    def outputs_last(self) -> Float[Tensor, "... d"]:
        """The output with its rows in the last dimension, a view."""
        return self.kind.outputs_last(self.module, self.output)

    def rows(self, z: Tensor) -> Float[Tensor, "n t d"]:
        """A tensor like the output as (samples, positions, outputs)."""
        last = self.kind.outputs_last(self.module, z)
        return last[None, None] if last.ndim == 1 else last.flatten(1, -2) if last.ndim > 2 else last[:, None]

    def from_rows(self, rows: Float[Tensor, "..."]) -> Tensor:
        """Undo :meth:`rows`: shaped and typed as the output."""
        last = rows.reshape(self.outputs_last().shape)
        back = self.kind.outputs_back(self.module, last).reshape(self.output.shape)
        return back.to(self.output.dtype).contiguous()

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

    ``mode`` stands for which modules were in training mode.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rng: RngState | None = None
    calls: list[Call] = field(default_factory=list)
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    mode: int = 0
    outputs: Any = None
    grad: bool = True


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
    if follow(tensor.grad_fn, KEEPING + MOVING, until=call.edge.node) is not call.edge.node:
        return False
    flat = output.detach().reshape(-1)
    return torch.equal(tensor.detach().reshape(-1).to(flat.dtype), flat)


def depends_on(tensor: Tensor, calls: Sequence[Call]) -> list[Call]:
    """The calls whose outputs the tensor was computed from; one walk over its graph."""
    wanted = {c.edge.node: c for c in calls if c.edge is not None}
    found = [wanted[node] for node in ancestors(tensor.grad_fn) if node in wanted]
    return [c for c in calls if c in found]


def is_recurrent(calls: Sequence[Call]) -> bool:
    """Whether an input of the layer was computed from an earlier output of it."""
    return any(depends_on(later.phi, calls[:i]) for i, later in enumerate(calls) if i)
