"""A recorded forward pass and its loss, run once more with a change."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from relflat.capture.calls import Forward
from relflat.capture.outputs import same_part
from relflat.capture.tap import Inject, Tap
from relflat.errors import GraphError
from relflat.loss.criterion import Criterion
from relflat.rng import rng_preserved


@dataclass(frozen=True, eq=False)
class Replay:
    """The passes behind a loss, of which a single one can be repeated, and what the loss was computed from.

    Dropout masks are those of the record (if the tap keeps random states); buffers such as BatchNorm statistics are
    left alone, and so are the global random number generators. ``again`` makes outputs and targets from the model
    anew, in place of the recorded call.
    """

    tap: Tap
    forwards: Sequence[Forward]
    outputs: Any
    criterion: Criterion
    again: Callable[[nn.Module], tuple[Any, Any]] | None = None

    def loss(self, *, inject: Inject | None = None, change: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The loss of one more forward pass, with other inputs to tapped layers, or a tensor in a parameter's place.

        Raises:
            GraphError: several passes led to the loss.
        """
        if len(self.forwards) != 1 and self.again is None:
            raise GraphError(
                f"radius and finite differences repeat one forward pass, and there were {len(self.forwards)} since "
                "the last call of the criterion; call it once after each, or use another method"
            )
        record, model = self.forwards[0], self.tap.model
        replaced = {name: b.clone() for name, b in model.named_buffers()}
        if change is not None:
            replaced |= {n: change[1] for n, p in model.named_parameters() if p is change[0]}
        with self.tap.replaying(inject), rng_preserved(record.rng):
            if self.again is None:
                replayed = torch.func.functional_call(model, replaced, record.args, record.kwargs)
                return self.criterion(same_part(record.outputs, self.outputs, replayed))
            named = {f"model.{name}": x for name, x in replaced.items()}
            outputs, targets = torch.func.functional_call(_Again(model, self.again), named, ())
        return replace(self.criterion, targets=(targets,))(outputs)

    def loss_of(self, outputs: Tensor) -> Tensor | None:
        """The loss of other outputs, if the model's is a single tensor; no pass."""
        return self.criterion(outputs) if isinstance(self.outputs, Tensor) else None


class _Again(nn.Module):
    """What makes outputs and targets, as a module whose parameters can be replaced."""

    def __init__(self, model: nn.Module, again: Callable[[nn.Module], tuple[Any, Any]]) -> None:
        super().__init__()
        self.model, self.again = model, again

    def forward(self) -> tuple[Any, Any]:
        return self.again(self.model)
