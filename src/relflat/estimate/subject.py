"""One layer of a scene, with the operator and the space its kappa is taken in, each built once."""

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.autograd.graph import Node

from relflat.capture.calls import Call, is_recurrent, same_values
from relflat.capture.graph import ancestors, compiled, foreign, operation
from relflat.capture.kinds import own_weights
from relflat.capture.matrix import Matrix
from relflat.capture.outputs import read_by
from relflat.capture.pieces import piecewise_linear
from relflat.capture.uses import View, leaf
from relflat.curvature.operators import GGNOperator, HessianOperator, Operator, slope_in
from relflat.curvature.output_space import OutputSpace, feature_std
from relflat.curvature.slope import AskedLoss, must_be_asked
from relflat.curvature.space import Space
from relflat.curvature.weight_space import WeightSpace
from relflat.errors import ConfigError, GraphError, LossError, SecondDerivativeError, warn
from relflat.estimate.coupling import COUPLED, UNKNOWN, coupled_in_outputs, coupled_in_products, followed, may_reorder
from relflat.estimate.scene import Scene
from relflat.loss.known import KnownLoss
from relflat.options import Options
from relflat.rng import Rng


@dataclass
class Memory:
    """What was found out about a model in earlier steps and need not be asked again, by layer."""

    coupled: dict[tuple[str, int, int], bool] = field(default_factory=dict)
    """Whether samples are coupled after it, in a training mode of all modules and by these operations."""
    again: set[tuple[str, int, int]] = field(default_factory=set)
    """Where that must be asked again, as an operation may put samples in another order each time."""
    tries: int = 0
    """How often it was."""
    curved: set[str] = field(default_factory=set)
    """The loss was seen to have a curvature in its output, or said to have none."""
    past: dict[tuple[str, int], bool] = field(default_factory=dict)
    """Whether its weight leads to the loss in other ways than by its outputs, in a training mode of all modules."""
    views: dict[tuple[str, int], View] = field(default_factory=dict)
    """A parameter as a matrix, in a training mode of all modules."""
    through: set[str] = field(default_factory=set)
    """The loss was seen to depend on it through the outputs only."""
    finite: set[str] = field(default_factory=set)
    """Its kappa was seen to have a finite gradient, and nothing to make it otherwise later."""
    plain: set[tuple[str, int, str]] = field(default_factory=set)
    """Nothing compiled was seen between it and the loss, in a mode, for a kind of loss."""
    asked: dict[tuple[int, str], bool] = field(default_factory=dict)
    """Whether the loss must be asked for its curvature, as autograd has none or a wrong one: by mode and kind."""


class Subject:
    """One layer of a scene; ``together`` takes all samples as one group, coupled or not."""

    def __init__(
        self, scene: Scene, layer: str, options: Options, memory: Memory, seed: int, *, together: bool = False
    ) -> None:
        self.scene, self.layer, self.options = scene, layer, options
        self.memory, self.seed, self.together = memory, seed, together
        self.calls: list[Call] = scene.calls_of(layer)
        if options.normalize_features and not self.calls:
            raise ConfigError(f"normalize_features needs features, and {layer!r} is a parameter; name a layer")

    @property
    def target(self) -> nn.Module | nn.Parameter:
        """The layer itself."""
        return self.calls[0].module if self.calls else self.scene.parameters[self.layer]

    @functools.cached_property
    def in_weight(self) -> bool:
        """Whether kappa is taken in the weight, not in the outputs, which are not all of its ways to the loss.

        So for a parameter, a weight that the loss or a derivative in the network depends on, and a recurrent layer:
        the Hessian of a recurrent layer has terms through its later inputs. The Gauss-Newton matrix has none, and is
        taken in the weight only where that is tied to another module's, so that both are of all the uses.
        """
        if not self.calls:
            return True
        if self._past():
            return True
        return (self.options.curvature == "hessian" or self.calls[0].tied) and is_recurrent(self.calls)

    def _past(self) -> bool:
        """Whether the weight leads past the outputs: by the loss itself, looked at each time, or in the network."""
        key = self.layer, self.scene.mode
        if self.scene.loss.grad_fn is None:
            return self.memory.past.get(key, False)
        if key not in self.memory.past:
            self.memory.past[key] = self.scene.uses.past(self.calls)
        if self.memory.past[key] or self.scene.known is not None:  # a known loss is one of the outputs alone
            return self.memory.past[key]
        return any(leaf(w) in self.scene.beside for w in own_weights(self.calls[0].module))

    @functools.cached_property
    def matrix(self) -> Matrix:
        """The weight by itself."""
        target, key = self.target, (self.layer, self.scene.mode)
        if isinstance(target, nn.Module):
            return Matrix.of(self.layer, target)
        if key not in self.memory.views:
            self.memory.views[key] = self.scene.uses.view(target)
        return Matrix.of(self.layer, target, self.memory.views[key])

    @functools.cached_property
    def last(self) -> bool:
        """Whether the layer's output as it is is what the loss was computed from."""
        known = self.scene.known
        outputs = self.scene.outputs if known is None else known.outputs
        return bool(self.calls) and outputs is not None and same_values(self.calls[0], outputs, self.calls[0].output)

    @property
    def at_end(self) -> bool:
        """Whether the loss is a function of that alone, so that Hessian and GGN are one."""
        return self.last and not self.in_weight

    @property
    def factors(self) -> KnownLoss | None:
        """The loss, if the Gauss-Newton matrix may be taken from the known factors of its Hessian.

        That is the Hessian's too, in measuring, where what comes after the layer is piecewise linear.
        """
        if self.options.method == "exact" or not (self.options.curvature == "ggn" or self._same_as_ggn):
            return None
        if self.options.full:  # else first derivatives do
            self._must_be_plain()
        return self.scene.known

    @functools.cached_property
    def _same_as_ggn(self) -> bool:
        known = self.scene.known
        if known is None or not self.options.measuring or self.in_weight:
            return False
        return piecewise_linear(known.outputs.grad_fn, {c.edge.node for c in self.calls if c.edge is not None})

    @functools.cached_property
    def scale(self) -> Tensor | None:
        """What features are divided by, with ``normalize_features``."""
        if not self.options.normalize_features:
            return None
        given = self.scene.scales.get(self.layer)
        return feature_std(self.calls) if given is None else given

    @functools.cached_property
    def space(self) -> Space:
        """Where the weight moves; whether samples are coupled is settled first."""
        if self.in_weight:
            return self._weight_space
        return self.output_space(coupled=self.together or self._coupled())

    def output_space(self, *, coupled: bool = False) -> OutputSpace:
        """The layer's outputs, for a layer with calls."""
        return OutputSpace.of(self.calls, self.scale, coupled=coupled, constant=self.options.constant_features)

    @functools.cached_property
    def _weight_space(self) -> WeightSpace:
        if self.options.gradient == "frozen" and not self.options.measuring:
            raise ConfigError(
                f"gradient='frozen' keeps the gradient through the features, and those of layer {self.layer!r} are "
                "not seen as its curvature is taken in its weight; use gradient='full' or 'weights'"
            )
        return WeightSpace(self.matrix, self.scale)

    @functools.cached_property
    def operator(self) -> Operator:
        """Products with the curvature of the whole batch."""
        self._must_be_plain()
        loss, full, known = self.scene.loss.sum(), self.options.full, self.scene.known
        calls = self._weight_space.calls if self.in_weight else self.calls
        hessian = self.options.curvature == "hessian"
        if known is not None and (self.at_end or not hessian):
            curve = functools.partial(known.curve, constant=not full)
            operator: Operator = GGNOperator([known.outputs], curve, calls, create_graph=full)
        elif hessian or self.at_end:
            slope = self._asked_slope()
            of = loss if slope is None else self._outputs(calls)[0]
            operator = HessianOperator(of, calls, slope, create_graph=full)
        else:
            outputs, slope = self._outputs(calls), self._asked_slope()
            slopes = slope_in(outputs, loss) if slope is None else [slope]
            operator = GGNOperator(outputs, slopes, calls, create_graph=full)
        if not self.in_weight and self.layer not in self.memory.curved:
            self._warn_if_flat(operator)
        return operator

    def ends(self) -> list[Node]:
        """Where the graph passes what its curvature is taken in."""
        return [c.edge.node for c in self.space.calls if c.edge is not None]

    def _must_be_plain(self) -> None:
        """Refuse compiled parts between the layer and the loss; looked for once a layer, mode and kind of loss."""
        loss = self.scene.loss.grad_fn
        key = (self.layer, self.scene.mode, "" if loss is None else loss.name())
        if key in self.memory.plain:
            return
        for node in ancestors(loss, without=[c.edge.node for c in self.calls if c.edge is not None]):
            if operation(node) == "SyncBatchNorm":
                raise SecondDerivativeError(
                    f"SyncBatchNorm after layer {self.layer!r} couples the samples of all ranks and cannot be "
                    "differentiated twice (in training mode; its evaluation mode can)"
                )
            if operation(node) == "WeightNormInterface" and self._comes_from_it(node):
                raise SecondDerivativeError(
                    f"PyTorch's second derivative of weight normalisation in {self.layer!r} is wrong; name the layer "
                    "that it belongs to"
                )
            if compiled(node):
                raise SecondDerivativeError(
                    f"a part after layer {self.layer!r} is compiled, and has no second derivatives"
                )
        self.memory.plain.add(key)

    def _comes_from_it(self, node: Node) -> bool:
        return isinstance(self.target, nn.Parameter) and leaf(self.target) in set(ancestors(node))

    def _asked_slope(self) -> Tensor | None:
        """The slope of the loss in the outputs by differences, where autograd has no right derivative of it.

        None where autograd is right, which is asked for once a mode and kind of loss.
        """
        scene, outputs = self.scene, self.scene.outputs
        if outputs is None or outputs.grad_fn is None or scene.known is not None:
            return None
        key = (scene.mode, "" if scene.loss.grad_fn is None else scene.loss.grad_fn.name())
        loss_of = None if scene.replay is None else functools.partial(scene.replay.loss_of, given=outputs)
        if key not in self.memory.asked:
            rng, only_products = Rng(self.seed, -3), not self.options.full
            self.memory.asked[key] = must_be_asked(
                scene.loss.sum(), outputs, loss_of, rng, only_products=only_products
            )
        if not self.memory.asked[key]:
            return None
        if self.options.full:
            raise LossError(
                "the derivative of the loss is an operation of its own that cannot be differentiated again (a fused "
                "kernel, or a backward that takes for constant what is none); use the plain loss, gradient='frozen', "
                "or FAM(..., radius=...)"
            )
        assert loss_of is not None
        return AskedLoss.of(loss_of, outputs).as_tensor(outputs)

    def _outputs(self, calls: Sequence[Call]) -> list[Tensor]:
        """What the loss was computed from, and nothing else of the layer: else its GGN would lack that part."""
        loss, one = self.scene.loss, self.scene.outputs
        outputs = read_by(loss, self.scene.given) if one is None else [one]
        if not outputs:
            raise GraphError(
                "curvature='ggn' needs the tensors that the loss was computed from, and the model's outputs are "
                "none, or one of them leads to another; use curvature='hessian' or call the criterion with "
                "(outputs, targets)"
            )
        ends = [z.grad_fn for z in outputs if z.grad_fn is not None]
        if (self.in_weight or self.layer not in self.memory.through) and ends:
            past = set(ancestors(loss.grad_fn, without=ends))
            if one is None:
                _must_be_torchs(past)
            if any(c.edge is not None and c.edge.node in past for c in calls):
                raise GraphError(
                    f"the loss depends on layer {self.layer!r} also past the tensor taken for the outputs (an "
                    "auxiliary loss, a second head, a penalty on the weight or on a gradient), so there is no "
                    "Gauss-Newton matrix; use curvature='hessian'"
                )
        self.memory.through.add(self.layer)
        return outputs

    def _warn_if_flat(self, operator: Operator) -> None:
        """Warn, once a layer, where a gradient meets no curvature in a random direction."""
        rng = Rng(self.seed, -2)
        products = operator([rng.signs(tuple(c.output.shape), c.output) for c in self.calls])
        if not any(bool(x.any()) for x in products) and any(bool(x.any()) for x in operator.slope_at_calls()):
            warn(
                f"the loss has a gradient in the output of layer {self.layer!r} but no curvature on this batch, so "
                "kappa is 0 there; a hinge or absolute error has none anywhere: use a smooth loss, or radius="
            )
        self.memory.curved.add(self.layer)

    def _coupled(self) -> bool:
        """Settled once for each layer, mode of all modules and kind of graph, when a batch first has two samples.

        Where they were not, and an operation may order samples in another way each time, one split is tried again.
        """
        if self.calls[0].samples < 2 or len({c.samples for c in self.calls}) > 1:
            return False
        known, key = self.memory.coupled, (self.layer, self.scene.mode, self.scene.kind)
        if key not in known:
            self._settle_coupling()
        elif key in self.memory.again and not known[key] and self._reordered():
            self.memory.tries += 1
            rng = Rng(self.seed, -4 - self.memory.tries)
            if self.factors is None:
                known[key] = coupled_in_products(self.operator, self.calls, rng, once=True)
            else:
                known[key] = coupled_in_outputs(self.factors.outputs, {"": self.calls}, rng, once=True)[""]
        return known[key]

    def _reordered(self) -> bool:
        ends = {c.edge.node for c in self.calls if c.edge is not None}
        return any(map(may_reorder, ancestors(self.scene.loss.grad_fn, ends)))

    def _coupled_by_derivatives(self, asked: Mapping[str, Sequence[Call]]) -> dict[str, bool]:
        """Of all the layers at once where one pull-back answers, else of this one."""
        rng = Rng(self.seed, -1)
        if self.factors is None:
            return {self.layer: coupled_in_products(self.operator, self.calls, rng)}
        return coupled_in_outputs(self.factors.outputs, asked, rng)

    def _settle_coupling(self) -> None:
        """By the operations after layers, of all of them; else by derivatives."""
        factors, mode, kind = self.factors, self.scene.mode, self.scene.kind
        calls = self.scene.with_samples_of(self.calls)
        states = followed((self.scene.loss if factors is None else factors.outputs).grad_fn, calls)
        found = {layer: state == COUPLED for layer, state in states.items() if state != UNKNOWN}
        if self.layer not in found:
            asked = {layer: [c for c in calls if c.layer == layer] for layer in states if layer not in found}
            self.memory.again.update((layer, mode, kind) for layer in asked)
            found |= self._coupled_by_derivatives(asked)
        self.memory.coupled.update({(layer, mode, kind): coupled for layer, coupled in found.items()})


def _must_be_torchs(nodes: Collection[Node]) -> None:
    """Refuse derivatives of somebody's own."""
    for node in filter(foreign, nodes):
        raise LossError(
            f"the loss goes through {node.name()}, whose second derivative may be wrong without a word, and that can "
            "be told for outputs of one tensor only: use curvature='hessian', or a plain loss"
        )


def joint_operator(subjects: Sequence[Subject]) -> Operator:
    """Products with the Hessian in all the layers together; of one, its own operator."""
    first = subjects[0]
    if len(subjects) == 1:
        return first.operator
    for s in subjects:
        s._must_be_plain()
    slope, calls = first._asked_slope(), [c for s in subjects for c in s.space.calls]
    of = first.scene.loss.sum() if slope is None else first._outputs(calls)[0]
    return HessianOperator(of, calls, slope, create_graph=False)
