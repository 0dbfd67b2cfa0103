"""A forward pass and its loss: everything an estimate is made from."""

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves

from relflat.capture.calls import Call, Forward, depends_on, no_graph
from relflat.capture.graph import ancestors, fingerprint
from relflat.capture.outputs import output_tensor
from relflat.capture.tap import Tap
from relflat.capture.uses import Uses
from relflat.errors import GraphError
from relflat.estimate.replay import Replay
from relflat.loss.known import KnownLoss
from relflat.loss.reading import read_loss


@dataclass(frozen=True, eq=False)
class Scene:
    """A forward pass and its loss, a scalar or one value a sample.

    Attributes:
        calls: the tapped calls that the loss depends on.
        outputs: the tensor the loss was computed from, if there is one.
        known: what is known of the loss.
        given: what the loss was computed from, of any structure; None if that is not known.
        parameters: tapped parameters and modules whose curvature is taken in the weight.
        mode: stands for which modules of the model are in training mode.
        scales: standard deviation of the features by layer, if they are to be normalised by a given one.
        replay: repeats the pass with a change; None where its loss cannot be computed again.
        plain: whether the pass ran without compiled code and fused attention.
        recorded: calls of all layers, of those too that this is not about.
    """

    loss: Tensor
    calls: Sequence[Call]
    outputs: Tensor | None = None
    given: Any = None
    known: KnownLoss | None = None
    parameters: Mapping[str, nn.Module | nn.Parameter] = field(default_factory=dict)
    mode: int = 0
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    replay: Replay | None = None
    plain: bool = False
    recorded: Sequence[Call] = ()

    @classmethod
    def of(
        cls, forwards: Sequence[Forward], loss: Tensor, calls: Sequence[Call] | None = None, **known: Any
    ) -> "Scene":
        """The scene of passes that led to a loss, by default with the calls behind it; further attributes by name."""
        calls, last = calls_behind(forwards, loss) if calls is None else calls, forwards[-1]
        other = {c.layer: c.own_module() for c in calls if not c.linear}
        calls = [c for c in calls if c.layer not in other]
        return cls(loss, calls, parameters={**last.parameters, **other}, mode=last.mode, recorded=calls, **known)

    @functools.cached_property
    def kind(self) -> int:
        """Stands for the operations of the graph, how they are joined, where layers are in it and samples may be."""
        calls = self.recorded or self.calls
        at = {c.edge.node: c.layer for c in calls if c.edge is not None}
        samples = next((c.samples for c in calls if not c.output.is_nested), 1)
        return fingerprint(self.loss.grad_fn, at, max(samples, 1))

    @classmethod
    def of_loss(cls, tap: Tap, forwards: Sequence[Forward], loss: Tensor) -> "Scene":
        """What a loss tells that was computed elsewhere, from passes that a tap recorded."""
        outputs = output_tensor(forwards[-1].outputs, other_than=loss) if len(forwards) == 1 else None
        known, call = read_loss(loss, calls_behind(forwards, loss), outputs) or (None, None)
        if tap.unsettled:
            tap.settle(forwards, loss, outputs if known is None else known.outputs, call)
        given, replay = [outputs, *(f.outputs for f in forwards)], Replay.of_loss(tap, forwards, loss)
        return cls.of(forwards, loss, outputs=outputs, given=given, known=known, replay=replay)

    @functools.cached_property
    def uses(self) -> Uses:
        """Where parameters go; a walk over all of the graph."""
        return Uses(self.loss)

    @functools.cached_property
    def beside(self) -> set[Node]:
        """What leads to the loss neither by what it was computed from nor by a call: the part that is the loss's own.

        A few operations, or with an explicit weight decay the parameters too.
        """
        given = [t for t in tree_leaves(self.given) if isinstance(t, Tensor) and t.ndim]
        ends = {t.grad_fn for t in given if t.grad_fn is not None}
        edges = {c.edge.node for c in self.calls if c.edge is not None}
        return set(ancestors(self.loss.grad_fn, ends | edges)) if ends else set()

    def read(self) -> "Scene":
        """With what the graph of the loss tells of it, where its function is not known."""
        reading = None if self.known is not None else read_loss(self.loss, self.calls, self.outputs)
        return self if reading is None else replace(self, known=reading.known)

    def plainly(self) -> "Scene":
        """The pass run once more without compiled code and fused attention, which cannot be differentiated twice."""
        assert self.replay is not None
        forward, part, loss = self.replay.plainly()
        criterion, outputs = self.replay.criterion, output_tensor(forward.outputs)
        known = None
        if criterion is not None:
            outputs, known = output_tensor(part), criterion.known(part)
            outputs = None if known is None and criterion.trained_through else outputs
        replay = replace(self.replay, forwards=[forward], outputs=part)
        made = Scene.of(
            [forward], loss, outputs=outputs, given=part, known=known, scales=self.scales, replay=replay, plain=True
        )
        return replace(made.read().only(self.layers), parameters=self.parameters)

    @property
    def layers(self) -> list[str]:
        """Names of the layers that took part, in order."""
        return [*dict.fromkeys(c.layer for c in self.calls), *self.parameters]

    def calls_of(self, layer: str) -> list[Call]:
        """The calls of one layer, in order; none for a parameter."""
        return [c for c in self.calls if c.layer == layer]

    def with_samples_of(self, calls: Sequence[Call]) -> list[Call]:
        """All recorded calls with a place in the graph and as many samples as these."""
        seen = [c for c in self.recorded if c.edge is not None and not c.output.is_nested]
        return [c for c in dict.fromkeys([*seen, *calls]) if c.samples == calls[0].samples]

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
    """The recorded calls that the loss depends on, which must have a graph; all of them if there is only one."""
    calls = [c for f in forwards for c in f.calls]
    if not loss.requires_grad:
        raise no_graph()
    if len(calls) <= 1:
        return calls
    needed = depends_on(loss, calls)
    if not needed:
        raise GraphError(
            f"the loss does not depend on the output of layer {calls[0].layer!r} in the last forward pass of the "
            "model; give the criterion the outputs of that very pass, not detached, not of another model and not "
            "through quantised layers, which have no derivative"
        )
    return needed
