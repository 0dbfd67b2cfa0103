"""The one place that chooses how kappa is computed for the layers of a forward pass, and says what it chose."""

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from relflat.capture.calls import Call, Forward, ancestors, depends_on, feeds_itself, same_values
from relflat.curvature.operators import GGNOperator, HessianOperator, Operator, check_differentiable_again
from relflat.curvature.output_space import Site, feature_std
from relflat.curvature.weight_space import Matrix, WeightSpace
from relflat.errors import ConfigError, GraphError, LossError, warn
from relflat.estimate import closed_form, probes
from relflat.estimate.probes import Contributions, Gradient
from relflat.loss.known import KnownLoss
from relflat.rng import Rng

Curvature = Literal["hessian", "ggn"]
Method = Literal["auto", "closed_form", "exact", "probe", "finite_difference", "xtrace"]


@dataclass(frozen=True)
class Spec:
    """What is to be estimated and how; the options that FAM and relative_flatness share.

    Attributes:
        curvature: the Hessian, or its Gauss-Newton part (never negative for losses convex in the outputs).
        method: how; ``"auto"`` takes the cheapest that is exact or unbiased for ``curvature``.
        probes: products for a stochastic method.
        adaptive: the adaptive form (I9) in place of kappa.
        normalize: divide features by their standard deviation (and multiply the weight by it), leaving out those
            that never vary.
        gradient: which derivatives of kappa are kept; None for measuring (no graph).
        trace: whether ``Tr H`` is wanted too.
        temperature: the softmax in the closed form is that of ``logits / temperature`` (Han et al. 2025).
        unit_features: features in the closed form have norm 1 (Han et al. 2025).
        exact_up_to: largest number of products for which ``"auto"`` prefers a sum over a basis; in training
            for output layers only, whose products cost nothing but the loss.
    """

    curvature: Curvature = "ggn"
    method: Method = "auto"
    probes: int = 1
    adaptive: bool = False
    normalize: bool = False
    gradient: Gradient | None = "full"
    trace: bool = False
    exact_up_to: int = 16
    temperature: float = 1.0
    unit_features: bool = False

    def __post_init__(self) -> None:
        choices = [("curvature", Curvature), ("method", Method), ("gradient", Gradient)]
        for name, allowed in choices:
            value = getattr(self, name)
            if value not in get_args(allowed) and not (name == "gradient" and value is None):
                raise ConfigError(f"{name}={value!r}: choose one of {list(get_args(allowed))}")
        if self.method == "xtrace" and self.gradient is not None:
            raise ConfigError(
                "method='xtrace' measures over all of the data and has no gradient; use it in relative_flatness, and "
                "'auto' or 'probe' in training"
            )
        if self.probes < 1:
            raise ConfigError(f"probes={self.probes}: at least one product is needed")
        if not self.temperature > 0:
            raise ConfigError(f"temperature={self.temperature}: a positive number is needed")
        if self.changes_closed_form and self.method not in ("auto", "closed_form"):
            raise ConfigError(
                f"temperature, unit_features change the closed form, and method={self.method!r} is another one; use "
                "method='auto'"
            )

    @property
    def changes_closed_form(self) -> bool:
        """Whether kappa in the closed form is that of another softmax or of other features."""
        return self.temperature != 1 or self.unit_features

    @property
    def mode(self) -> Gradient:
        """The gradient mode; measuring detaches everything, so any will do."""
        return self.gradient or "weights"

    @property
    def create_graph(self) -> bool:
        """Whether products must be differentiable themselves (third derivatives)."""
        return self.gradient == "full"


@dataclass
class Scene:
    """A forward pass and its loss: everything an estimate is made from.

    Attributes:
        calls: the tapped calls that the loss depends on.
        loss: the scalar loss, or one value a sample.
        outputs: the tensor the loss was computed from, if known.
        known: what is known of the loss.
        targets: the targets, if ``known``.
        parameters: tapped parameters, whose curvature is taken in themselves.
        mode: stands for which modules of the model are in training mode.
        scales: standard deviation of the features by layer, if they are to be normalised by a given one.
    """

    calls: list[Call]
    loss: Tensor
    outputs: Tensor | None
    known: KnownLoss | None = None
    targets: Tensor | None = None
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    mode: int = 0
    scales: dict[str, Tensor] = field(default_factory=dict)


class Estimator:
    """Estimates kappa of layers in a scene; remembers whether samples are coupled after each layer."""

    def __init__(self, spec: Spec, seed: int) -> None:
        self.spec, self.seed = spec, seed
        self._coupled: dict[tuple[str, int], bool] = {}
        self._checked: set[str] = set()
        self._curved: set[str] = set()
        self._through: set[str] = set()

    def __call__(self, scene: Scene, step: int) -> dict[str, Contributions]:
        """The contributions to kappa of every tapped layer, each with its method.

        Args:
            scene: the forward pass and loss.
            step: with the seed, determines the probes.
        """
        spec, found, rng = self.spec, dict[str, Contributions](), Rng(self.seed, step)
        by_layer: dict[str, list[Call]] = {}
        for call in scene.calls:
            by_layer.setdefault(call.layer, []).append(call)
        with torch.autocast(scene.loss.device.type, enabled=False):
            pooled: list[list[Call]] = []
            for layer, calls in by_layer.items():
                reason = closed_form.why_not(calls, scene.outputs, scene.known)
                if reason and spec.changes_closed_form:
                    raise ConfigError(
                        f"temperature, unit_features change the closed form, and layer {layer!r} has none: {reason}"
                    )
                if spec.method == "closed_form" and reason:
                    raise LossError(f"no closed form for layer {layer!r}: {reason}; use method='auto'")
                if reason is None and spec.method in ("auto", "closed_form"):
                    found[layer] = self._closed_form(scene, calls)
                elif self._needs_weight(calls):
                    matrix = Matrix.of(layer, calls[0].module)
                    found[layer] = self._in_weight(scene, matrix, self._scale(scene, calls), rng)
                elif spec.curvature == "ggn" and spec.method != "exact" and scene.known is not None:
                    pooled.append(calls)
                else:
                    found[layer] = self._one_layer(scene, calls, rng)
            if pooled:
                found |= self._factored(scene, pooled, rng)
            for layer, parameter in scene.parameters.items():
                if spec.method == "closed_form":
                    raise LossError(
                        f"no closed form for parameter {layer!r}: only for output layers; use 'auto'"
                    )
                if spec.changes_closed_form:
                    raise ConfigError(
                        f"temperature, unit_features change the closed form, and {layer!r} is a parameter, which has "
                        "none; name the layer"
                    )
                if spec.normalize:
                    raise ConfigError(
                        f"normalize_features needs features, and {layer!r} is a parameter; name a layer"
                    )
                found[layer] = self._in_weight(scene, Matrix.of(layer, parameter), None, rng)
        if spec.create_graph:
            for layer in found.keys() - self._checked:
                check_differentiable_again(found[layer].kappa)
            self._checked |= found.keys()
        return {layer: found[layer] for layer in (*by_layer, *scene.parameters)}

    def curvatures(
        self, scene: Scene, *, without: Collection[str] = ()
    ) -> Iterator[tuple[str, Float[Tensor, "d m"], Callable[[Tensor], Tensor]]]:
        """Each layer's weight W, and ``V -> H V`` with the curvature in it of the whole batch, V like W.

        Args:
            scene: the forward pass and loss.
            without: layers to leave out.
        """
        matrices = {name: Matrix.of(name, p) for name, p in scene.parameters.items()}
        scales: dict[str, Tensor | None] = {}
        for layer in dict.fromkeys(c.layer for c in scene.calls if c.layer not in without):
            calls = [c for c in scene.calls if c.layer == layer]
            if self._needs_weight(calls):
                matrices[layer], scales[layer] = Matrix.of(layer, calls[0].module), self._scale(scene, calls)
                continue
            operator = self._operator(scene, calls, _at_end(scene, calls))
            site = self._site(scene, calls, coupled=True)
            self._must_be_curved(operator, site)
            yield layer, site.weight.detach(), functools.partial(probes.in_weight, operator, site)
        for layer in [name for name in matrices if name not in without]:
            space = self._space(matrices[layer], scales.get(layer))
            operator = self._operator(scene, [space.call])
            yield layer, space.weight.detach(), functools.partial(_detached, space, operator)

    def _needs_weight(self, calls: list[Call]) -> bool:
        """Whether kappa is taken in the layer's weight, not in its outputs: a layer that feeds itself.

        Its Hessian has terms through its later inputs. The Gauss-Newton matrix has none, and is taken in the weight
        only where that is tied to another module's, so that both are of the same uses: all of them.
        """
        return (self.spec.curvature == "hessian" or calls[0].tied) and feeds_itself(calls)

    def _scale(self, scene: Scene, calls: list[Call]) -> Tensor | None:
        if not self.spec.normalize:
            return None
        given = scene.scales.get(calls[0].layer)
        return feature_std(calls) if given is None else given

    def _site(self, scene: Scene, calls: list[Call], *, coupled: bool = False) -> Site:
        constant = self.spec.mode == "weights"
        return Site.of(calls, scale=self._scale(scene, calls), coupled=coupled, constant=constant)

    def _closed_form(self, scene: Scene, calls: list[Call]) -> Contributions:
        assert scene.known is not None
        assert scene.outputs is not None
        assert scene.targets is not None
        site = self._site(scene, calls)
        outputs = scene.outputs if self.spec.mode == "full" else scene.outputs.detach()
        if self.spec.temperature != 1 and scene.known.elementwise:
            raise ConfigError(f"temperature={self.spec.temperature} needs a softmax: only for cross-entropy")
        outputs = outputs / self.spec.temperature if self.spec.temperature != 1 else outputs
        hessian = closed_form.logit_hessian(site, scene.known, outputs, scene.targets)
        kappa = closed_form.kappa_rows(
            site, hessian, adaptive=self.spec.adaptive, unit_features=self.spec.unit_features
        )[None]
        unit = self.spec.unit_features
        trace = closed_form.trace_rows(site, hessian, unit_features=unit)[None] if self.spec.trace else None
        return Contributions(kappa, trace, "closed_form", True)

    def _factored(self, scene: Scene, layers: list[list[Call]], rng: Rng) -> dict[str, Contributions]:
        assert scene.known is not None
        assert scene.outputs is not None
        assert scene.targets is not None
        spec, outputs, sites = self.spec, scene.outputs, []
        for calls in layers:
            site = self._site(scene, calls)
            coupled = self._is_coupled(site, scene.mode, functools.partial(probes.coupled_outputs, outputs))
            sites.append(self._site(scene, calls, coupled=True) if coupled else site)
        parts = probes.ggn_factored(
            sites,
            scene.outputs,
            scene.known,
            scene.targets,
            probes=spec.probes,
            adaptive=spec.adaptive,
            mode=spec.mode,
            trace=spec.trace,
            rng=rng,
            create_graph=spec.create_graph,
        )
        return {site.layer: part for site, part in zip(sites, parts, strict=True)}

    def _one_layer(self, scene: Scene, calls: list[Call], rng: Rng) -> Contributions:
        spec = self.spec
        at_end = _at_end(scene, calls)
        operator = self._operator(scene, calls, at_end)
        site = self._site(scene, calls)
        self._must_be_curved(operator, site)
        if self._is_coupled(site, scene.mode, functools.partial(probes.coupled, operator)):
            site = self._site(scene, calls, coupled=True)
        products = probes.products_for_exact(site, adaptive=spec.adaptive, trace=spec.trace)
        cheap = products <= spec.exact_up_to and (at_end or spec.gradient is None)
        if spec.method == "exact" or (spec.method == "auto" and cheap):
            return probes.exact(operator, site, adaptive=spec.adaptive, gradient=spec.mode, trace=spec.trace)
        return probes.sampled(
            operator,
            site,
            probes=spec.probes,
            adaptive=spec.adaptive,
            gradient=spec.mode,
            trace=spec.trace,
            rng=rng,
            name="hessian" if at_end else spec.curvature,
        )

    def _must_be_curved(self, operator: Operator, site: Site) -> None:
        """Warn, once a layer, where the loss has no second derivative."""
        if site.layer not in self._curved and not probes.curved(operator, site, Rng(self.seed, -2)):
            warn(
                f"the loss has a gradient in the output of layer {site.layer!r} but no curvature on this batch, so "
                "kappa is 0 there; a hinge or absolute error has none anywhere: use a smooth loss, or radius="
            )
        self._curved.add(site.layer)

    def _operator(self, scene: Scene, calls: list[Call], at_end: bool = False) -> Operator:
        loss, create_graph = scene.loss.sum(), self.spec.create_graph
        if self.spec.curvature == "hessian" or at_end:
            return HessianOperator(loss, calls, create_graph=create_graph)
        if scene.outputs is None:
            raise GraphError(
                "curvature='ggn' needs the tensor that the loss was computed from, and the model's outputs are no "
                "single tensor; use curvature='hessian' or call the criterion with (outputs, targets)"
            )
        if calls[0].layer not in self._through:
            _only_through(scene.outputs, scene.loss, calls)
            self._through.add(calls[0].layer)
        return GGNOperator(loss, scene.outputs, calls, create_graph=create_graph)

    def _in_weight(self, scene: Scene, matrix: Matrix, scale: Tensor | None, rng: Rng) -> Contributions:
        spec, space = self.spec, self._space(matrix, scale)
        if spec.curvature == "ggn" and spec.method != "exact" and scene.known is not None:
            assert scene.outputs is not None
            assert scene.targets is not None
            factors = probes.factors(
                scene.outputs,
                scene.known,
                scene.targets,
                probes=spec.probes,
                constant=spec.mode != "full",
                rng=rng,
            )
            return space.ggn_factored(scene.outputs, factors, trace=spec.trace)
        operator = self._operator(scene, [space.call])
        cheap = spec.gradient is None and space.products_for_exact(trace=spec.trace) <= spec.exact_up_to
        if spec.method == "exact" or (spec.method == "auto" and cheap):
            return space.exact(operator, trace=spec.trace)
        return space.sampled(operator, probes=spec.probes, trace=spec.trace, rng=rng, name=spec.curvature)

    def _space(self, matrix: Matrix, scale: Tensor | None) -> WeightSpace:
        spec = self.spec
        return WeightSpace(
            matrix,
            scale=scale,
            adaptive=spec.adaptive,
            gradient=spec.mode,
            create_graph=spec.create_graph,
        )

    def _is_coupled(self, site: Site, mode: int, test: Callable[[Site, Rng], bool]) -> bool:
        """Ask once for each layer and mode of all modules of its model, when a batch first has two samples."""
        if site.shape[0] < 2:
            return False
        key = (site.layer, mode)
        if key not in self._coupled:
            self._coupled[key] = test(site, Rng(self.seed, -1))
        return self._coupled[key]


def _at_end(scene: Scene, calls: Sequence[Call]) -> bool:
    """Whether the loss is computed from the layer's output as it is, so that Hessian and GGN are one."""
    return scene.outputs is not None and same_values(calls[0], scene.outputs, calls[0].output)


def _detached(space: WeightSpace, operator: Operator, v: Tensor) -> Tensor:
    return space.product(operator, v).detach()


def _only_through(outputs: Tensor, loss: Tensor, calls: Sequence[Call]) -> None:
    """Refuse a loss that sees the layer past the outputs: its Gauss-Newton matrix would lack that part."""
    if outputs.grad_fn is None:
        return
    past = set(ancestors(loss.grad_fn, without=[outputs.grad_fn]))
    if any(c.edge is not None and c.edge.node in past for c in calls):
        raise GraphError(
            f"the loss depends on layer {calls[0].layer!r} also past the tensor taken for the outputs (an auxiliary "
            "loss, a second head), so there is no Gauss-Newton matrix; use curvature='hessian'"
        )


def scene_calls(forwards: Sequence[Forward], loss: Tensor) -> list[Call]:
    """The recorded calls that the loss depends on; all of them if there is only one.

    Raises:
        GraphError: if the forward pass or the loss recorded no graph.
    """
    calls = [c for f in forwards for c in f.calls]
    if not loss.requires_grad or not any(f.grad for f in forwards):
        raise GraphError(
            "the model is in training mode but the loss carries no graph (torch.no_grad() or detached outputs); "
            "call model.eval() to evaluate, or compute outputs and loss with gradients enabled"
        )
    if len(calls) <= 1:
        return calls
    needed = depends_on(loss, calls)
    if not needed:
        raise GraphError(
            f"the loss does not depend on the output of layer {calls[0].layer!r} in the last forward pass of the "
            "model; give the criterion the outputs of that very pass, not detached and not of another model"
        )
    return needed


def output_tensor(outputs: Any) -> Tensor | None:
    """The one tensor among a model's outputs that a loss is computed from: itself, ``logits``, or the only one."""
    if isinstance(outputs, Tensor):
        return outputs
    logits = outputs.get("logits") if hasattr(outputs, "get") else getattr(outputs, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    tensors = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
    return tensors[0] if len(tensors) == 1 else None
