"""One layer of a scene, with the operator and the space its kappa is taken in, each built once."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.autograd.graph import Node

from relflat.capture.calls import Call, is_recurrent, same_values
from relflat.capture.graph import ancestors, foreign, operation, piecewise_linear
from relflat.capture.kinds import own_weights, weight_of
from relflat.capture.outputs import read_by
from relflat.capture.uses import Matrix, leaf
from relflat.curvature.operators import GGNOperator, HessianOperator, Operator, slope_in
from relflat.curvature.output_space import OutputSpace, feature_std
from relflat.curvature.slope import AskedLoss, must_be_asked
from relflat.curvature.space import Space
from relflat.curvature.weight_space import WeightSpace
from relflat.errors import ConfigError, GraphError, LossError, SecondDerivativeError, warn
from relflat.estimate.coupling import coupled_in_outputs, coupled_in_products, followed, may_reorder, unreached
from relflat.estimate.scene import Scene
from relflat.loss.known import KnownLoss
from relflat.options import Options
from relflat.rng import Rng

T = TypeVar("T")
Key = tuple[str, int, int]
"""A layer, which modules are in training mode, and the operations of the graph: what is found out holds for these."""


@dataclass
class Memory:
    """What was found out about a model in earlier steps and need not be asked again, for graphs of the same kind."""

    coupled: dict[Key, bool] = field(default_factory=dict)  # whether samples are, after a layer
    hidden: dict[Key, bool] = field(default_factory=dict)  # where derivatives were asked: see _settle_coupling
    finite: set[Key] = field(default_factory=set)  # kappa's gradient was, and nothing makes it otherwise later
    tries: int = 0  # how often coupling was asked again
    answers: dict[tuple[str, Key, Any], Any] = field(default_factory=dict)

    def once(self, question: str, key: Key, find: Callable[[], T], of: Any = None) -> T:
        """The answer to a question about a layer in a kind of graph, found when it is asked first."""
        if (question, key, of) not in self.answers:
            self.answers[question, key, of] = find()
        return cast(T, self.answers[question, key, of])


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
    def key(self) -> Key:
        """What is found out of the layer is kept for."""
        return self.layer, self.scene.mode, self.scene.kind

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
        if self.scene.loss.grad_fn is None:  # closed forms were seen to apply with one
            return False
        past = self.memory.once("past", self.key, lambda: self.scene.uses.past(self.calls))
        if past or self.scene.known is not None:  # a known loss is one of the outputs alone
            return past
        return any(leaf(w) in self.scene.beside for w in own_weights(self.calls[0].module))

    @functools.cached_property
    def matrix(self) -> Matrix:
        """The weight by itself."""
        target = self.calls[0].own_module() if self.calls else self.target
        if isinstance(target, nn.Module):
            return Matrix.of(self.layer, target)
        view = self.memory.once("view", self.key, lambda: self.scene.uses.view(target), target.shape)
        return Matrix.of(self.layer, target, view)

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
        if not self.in_weight:
            self.memory.once("curved", (self.layer, 0, 0), lambda: self._warn_if_flat(operator))
        return operator

    def ends(self) -> list[Node]:
        """Where the graph passes what its curvature is taken in."""
        return [c.edge.node for c in self.space.calls if c.edge is not None]

    def _must_be_plain(self) -> None:
        """Refuse compiled parts between the layer and the loss, and what has wrong derivatives."""
        self.memory.once("plain", self.key, self._look_between)

    def _look_between(self) -> None:
        loss = self.scene.loss.grad_fn
        for node in ancestors(loss, without=[c.edge.node for c in self.calls if c.edge is not None]):
            if operation(node) == "SyncBatchNorm":
                raise SecondDerivativeError(
                    f"SyncBatchNorm after layer {self.layer!r} couples the samples of all ranks and cannot be "
                    "differentiated twice (in training mode; its evaluation mode can)"
                )
            if self._comes_wrongly_from(node):
                raise SecondDerivativeError(
                    f"PyTorch's second derivative of weight normalisation in {self.layer!r} is wrong, and that of an "
                    "embedding with scale_grad_by_freq=True; name the layer that it belongs to"
                )
            if node.name().startswith("CompiledFunction"):  # it takes what it saved for constants
                raise SecondDerivativeError(
                    f"a part after layer {self.layer!r} is compiled, and has no second derivatives"
                )

    def _comes_wrongly_from(self, node: Any) -> bool:
        wrong = operation(node) == "WeightNormInterface" or getattr(node, "_saved_scale_grad_by_freq", False)
        w = weight_of(self.target) if wrong and self.in_weight else None
        return isinstance(w, nn.Parameter) and leaf(w) in set(ancestors(node))

    def _asked_slope(self) -> Tensor | None:
        """The slope of the loss in the outputs by differences, where autograd has no right derivative of it.

        None where autograd is right.
        """
        scene, outputs = self.scene, self.scene.outputs
        if outputs is None or outputs.grad_fn is None or scene.known is not None:
            return None
        key = "", scene.mode, scene.kind
        loss_of = None if scene.replay is None else functools.partial(scene.replay.loss_of, given=outputs)
        ask = functools.partial(must_be_asked, scene.loss.sum(), outputs, loss_of, Rng(self.seed, -3))
        if not self.memory.once("asked", key, lambda: ask(only_products=not self.options.full)):
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
        look = functools.partial(self._must_lead_by, outputs, calls, sole=one is not None)
        _ = look() if self.in_weight else self.memory.once("through", self.key, look)
        return outputs

    def _must_lead_by(self, outputs: Sequence[Tensor], calls: Sequence[Call], *, sole: bool) -> None:
        ends = [z.grad_fn for z in outputs if z.grad_fn is not None]
        past = set(ancestors(self.scene.loss.grad_fn, without=ends)) if ends else set()
        if not sole:
            _must_be_torchs(past)
        if any(c.edge is not None and c.edge.node in past for c in calls):
            raise GraphError(
                f"the loss depends on layer {self.layer!r} also past the tensor taken for the outputs (an auxiliary "
                "loss, a second head, a penalty on the weight or on a gradient), so there is no Gauss-Newton matrix; "
                "use curvature='hessian'"
            )

    def _warn_if_flat(self, operator: Operator) -> None:
        """Warn, once a layer, where a gradient meets no curvature in a random direction."""
        rng = Rng(self.seed, -2)
        products = operator([rng.signs(tuple(c.output.shape), c.output) for c in self.calls])
        if not any(bool(x.any()) for x in products) and any(bool(x.any()) for x in operator.slope_at_calls()):
            warn(
                f"the loss has a gradient in the output of layer {self.layer!r} but no curvature on this batch, so "
                "kappa is 0 there; a hinge or absolute error has none anywhere: use a smooth loss, or radius="
            )

    def _coupled(self) -> bool:
        """Settled once for each layer and kind of graph, when a batch first has two samples.

        Where they were not, and an operation may order samples in another way each time, one split is tried again;
        where an operation that may couple them had no part in the loss yet, all are.
        """
        if self.calls[0].samples < 2 or len({c.samples for c in self.calls}) > 1:
            return False
        known, key = self.memory.coupled, self.key
        hidden = self.memory.hidden.get(key)
        if key not in known or (hidden and not known[key]):
            self._settle_coupling()
        elif hidden is not None and not known[key] and self._reordered():
            self.memory.tries += 1
            known[key] = self._coupled_by_derivatives({self.layer: self.calls}, self.memory.tries)[self.layer]
        return known[key]

    def _reordered(self) -> bool:
        ends = {c.edge.node for c in self.calls if c.edge is not None}
        return any(map(may_reorder, ancestors(self.scene.loss.grad_fn, ends)))

    def _coupled_by_derivatives(self, asked: Mapping[str, Sequence[Call]], tries: int = 0) -> dict[str, bool]:
        """Of all the layers at once where one pull-back answers, else of this one."""
        rng, shares = Rng(self.seed, -4 - tries if tries else -1), self._shares
        if shares is not None:
            return coupled_in_outputs(shares, asked, rng, once=tries > 0)
        if self.factors is None:
            return {self.layer: coupled_in_products(self.operator, self.calls, rng, once=tries > 0)}
        return coupled_in_outputs(self.factors.outputs, asked, rng, once=tries > 0)

    @property
    def _shares(self) -> Tensor | None:
        """Losses that each want the share of the sample of their number."""
        return None if self.scene.loss.ndim == 0 or self.options.measuring else self.scene.loss

    def _settle_coupling(self) -> None:
        """By the operations after layers, of all of them; else by derivatives.

        Which do not tell of operations that no gradient came to; these are then asked again (``hidden``).
        """
        calls = self.scene.with_samples_of(self.calls)
        root = self.scene.loss.sum() if self.factors is None else self.factors.outputs
        found, met = followed(root.grad_fn, calls)
        if self._shares is not None:
            found = {}
        if self.layer not in found:
            layers = dict.fromkeys(c.layer for c in calls if c.layer not in found)
            asked = {layer: [c for c in calls if c.layer == layer] for layer in layers}
            found |= self._coupled_by_derivatives(asked)
            unseen = not all(found.values()) and unreached(root, calls, met, Rng(self.seed, -3))
            self.memory.hidden.update({(layer, *self.key[1:]): unseen for layer in asked})
        self.memory.coupled.update({(layer, *self.key[1:]): coupled for layer, coupled in found.items()})


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
