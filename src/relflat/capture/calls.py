"""What a forward pass leaves behind: the calls of the tapped layers, and what was computed from them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from relflat.capture.graph import KEEPING, MOVING, ancestors, follow, same_memory
from relflat.capture.kinds import Kind, as_rows
from relflat.errors import GraphError, LayerError
from relflat.rng import RngState

_MOST = 8


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of a tapped layer within a forward pass: input, output and weight as they were at that moment."""

    layer: str
    module: nn.Module
    kind: Kind
    phi: Tensor
    weight: Float[Tensor, "d m"]
    output: Tensor  # what it returned; may have been overwritten in place since
    edge: GradientEdge | None  # where to take gradients in the output, overwritten or not; None under no_grad
    versions: tuple[int, int]  # of input and output at that moment
    tied: bool = False  # whether another module has the same weight
    source: Node | None = None  # what made the input, before anything overwrote it
    linear: bool = True  # whether the output is W phi + b; if not, curvature is taken in the weight

    @property
    def samples(self) -> int:
        """How many samples the call saw; one if it had no batch dimension."""
        if self.output.is_nested:
            raise LayerError(
                f"the output of layer {self.layer!r} is a nested tensor, which has no rows of one shape; name a "
                "layer that runs on padded or packed tensors, or after pooling"
            )
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
        return as_rows(self.kind.outputs_last(self.module, z))

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


def autocast_now() -> dict[str, tuple[bool, torch.dtype]]:
    """Whether autocast is on, and its type, by kind of device."""
    kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds}


@dataclass(slots=True, eq=False)
class Forward:
    """What one forward pass of the model left."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rng: RngState | None = None
    calls: list[Call] = field(default_factory=list)
    parameters: dict[str, nn.Module | nn.Parameter] = field(default_factory=dict)
    mode: int = 0  # stands for which modules were in training mode
    outputs: Any = None
    grad: bool = True
    autocast: dict[str, tuple[bool, torch.dtype]] = field(default_factory=autocast_now)


class Pending:
    """A queue of recorded passes: each call of the criterion takes all of them."""

    def __init__(self) -> None:
        self.clear()

    def __len__(self) -> int:
        return len(self._records)

    def clear(self) -> None:
        """Forget all, and that there were any."""
        self._records: list[Forward] = []
        self._overflow = self._used = False

    def put(self, record: Forward) -> None:
        """Add a pass; when too many wait they are dropped, and the next :meth:`take` says so."""
        if len(self._records) == _MOST:
            self._records, self._overflow = [], True
        self._records.append(record)
        self._used = False

    def take(self, model: str) -> list[Forward]:
        """Hand over the passes since the last call, oldest first; ``model`` is its class, for the error."""
        records, overflow, used = self._records, self._overflow, self._used
        self._records, self._overflow, self._used = [], False, used or bool(records)
        if overflow:
            raise GraphError(
                f"more than {_MOST} training forward passes since the criterion was last called, so the older ones "
                "were dropped; call it once after each, run unused ones under torch.no_grad() with model.eval(), or "
                "call its reset() first"
            )
        if not records:
            raise GraphError(
                "no training forward pass to go with this criterion call: "
                + (
                    "an earlier call used the last one; run the model again before each call, or add the losses and "
                    "call the criterion once"
                    if used
                    else f"call the model ({model}, as given to FAM, in training mode and not one of its parts) "
                    "first, and the criterion once after it"
                )
            )
        return records


def same_values(call: Call, tensor: Float[Tensor, "..."], output: Float[Tensor, "..."]) -> bool:
    """Whether ``tensor`` is ``output``, reshaped, cast or copied but not computed upon.

    ``output`` is that of the call, or a view of it with its dimensions in another order. Not a comparison of numbers
    alone: either both share memory that nothing overwrote, or the graph between them consists of copies only.
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
    wanted = {c.edge.node for c in calls if c.edge is not None}
    found = wanted.intersection(ancestors(tensor.grad_fn))
    return [c for c in calls if c.edge is not None and c.edge.node in found]


def is_recurrent(calls: Sequence[Call]) -> bool:
    """Whether an input of the layer was computed from an earlier output of it."""
    return any(depends_on(later.phi, calls[:i]) for i, later in enumerate(calls) if i)
