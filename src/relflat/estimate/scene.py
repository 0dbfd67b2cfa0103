"""A forward pass and its loss: everything an estimate is made from."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from relflat.capture.calls import Call, Forward, depends_on, no_graph
from relflat.errors import GraphError
from relflat.estimate.replay import Replay
from relflat.loss.known import KnownLoss


@dataclass(frozen=True, eq=False)
class Scene:
    """A forward pass and its loss, a scalar or one value a sample.

    Attributes:
        calls: the tapped calls that the loss depends on.
        outputs: the tensor the loss was computed from, if there is one.
        known: what is known of the loss.
        parameters: tapped parameters, whose curvature is taken in themselves.
        mode: stands for which modules of the model are in training mode.
        scales: standard deviation of the features by layer, if they are to be normalised by a given one.
        replay: repeats the pass with a change; None where its loss cannot be computed again.
    """

    loss: Tensor
    calls: Sequence[Call]
    outputs: Tensor | None = None
    known: KnownLoss | None = None
    parameters: Mapping[str, nn.Parameter] = field(default_factory=dict)
    mode: int = 0
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    replay: Replay | None = None

    @classmethod
    def of(cls, forwards: Sequence[Forward], loss: Tensor, **known: Any) -> "Scene":
        """The scene of passes that led to a loss; further attributes by name."""
        calls, last = calls_behind(forwards, loss), forwards[-1]
        return cls(loss, calls, parameters=last.parameters, mode=last.mode, **known)

    @property
    def layers(self) -> list[str]:
        """Names of the layers that took part, in order."""
        return [*dict.fromkeys(c.layer for c in self.calls), *self.parameters]

    def calls_of(self, layer: str) -> list[Call]:
        """The calls of one layer, in order; none for a parameter."""
        return [c for c in self.calls if c.layer == layer]

    def only(self, layers: Collection[str]) -> "Scene":
        """The part that belongs to some layers."""
        return replace(
            self,
            calls=[c for c in self.calls if c.layer in layers],
            parameters={n: p for n, p in self.parameters.items() if n in layers},
        )

    def watched(self) -> dict[str, Tensor]:
        """What should vary with the input, by a name for messages."""
        found = {f"the features of layer {c.layer!r}": c.phi for c in self.calls}
        return found if self.outputs is None else found | {"the outputs": self.outputs}


def calls_behind(forwards: Sequence[Forward], loss: Tensor) -> list[Call]:
    """The recorded calls that the loss depends on; all of them if there is only one.

    Raises:
        GraphError: if the forward pass or the loss recorded no graph.
    """
    calls = [c for f in forwards for c in f.calls]
    if not loss.requires_grad:
        raise no_graph()
    if len(calls) <= 1:
        return calls
    needed = depends_on(loss, calls)
    if not needed:
        raise GraphError(
            f"the loss does not depend on the output of layer {calls[0].layer!r} in the last forward pass of the "
            "model; give the criterion the outputs of that very pass, not detached and not of another model"
        )
    return needed
