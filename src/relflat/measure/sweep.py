"""A model, a loss and data under measurement: one sweep over the batches, on one process or several."""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from relflat.capture.calls import Forward, depends_on
from relflat.capture.resolve import Layer
from relflat.capture.tap import Inject, Tap
from relflat.curvature.output_space import Site, std_of
from relflat.curvature.weight_space import Matrix
from relflat.distributed import gathered, several
from relflat.errors import (
    DataError,
    GraphError,
    LossError,
    NonFiniteError,
    SecondDerivativeError,
)
from relflat.estimate import closed_form
from relflat.estimate import differences as perturb
from relflat.estimate.choose import Estimator, Scene, Spec, output_tensor
from relflat.estimate.probes import Contributions
from relflat.guards import Guards
from relflat.loss.known import KnownLoss, known_loss
from relflat.measure.batches import (
    Batch,
    Batches,
    ForwardFn,
    Switch,
    default_forward,
    device_of,
    join,
    length,
    samples_in,
    undisturbed,
)
from relflat.measure.sums import LayerSums, Sums, joined, mean_and_variance
from relflat.rng import Rng
from relflat.sharding import kept_whole, reshard


@contextmanager
def measuring(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    data: Iterable[Batch] | Batch,
    layer: Layer,
    spec: Spec,
    *,
    forward: ForwardFn | None,
    device: torch.device | str | None,
    seed: int,
) -> Iterator["Measurement"]:
    """Tap a model for a measurement: evaluation mode and nothing disturbed inside, hooks gone after it."""
    if torch.is_inference_mode_enabled():
        raise GraphError("torch.inference_mode() is on, and curvature needs gradients; leave it out")
    recording = Switch()
    tap = Tap(model, layer, when=lambda: recording.on)
    place = device_of(model) if device is None else torch.device(device)
    try:
        if spec.normalize:
            tap.must_have_features("normalize_features")
        batches = Batches(data, forward or default_forward, place)
        with undisturbed(model), recording:
            yield Measurement(model, loss_fn, tap, batches, spec, seed)
    finally:
        tap.close()
        reshard(model)


@dataclass
class Measurement:
    """A model, a loss and data under measurement, one sweep at a time."""

    model: nn.Module
    loss_fn: Callable[..., Any]
    tap: Tap
    batches: "Batches"
    spec: Spec
    seed: int
    scales: dict[str, Tensor] = field(default_factory=dict)
    guards: Guards = field(default_factory=Guards)
    group: Any = None  # ranks that measure other shares of the data
    _without_graph: bool = False  # whether later batches can run under no_grad
    _now: Any = None  # record, outputs and targets of the last batch
    _additive: str | None = None  # how an unknown loss adds up over batches

    def sweep(self, first_probe: int, probes: int | None = None) -> Sums:
        """Go over the data once."""
        spec = self.spec if probes is None else replace(self.spec, probes=probes)
        estimator = Estimator(spec, self.seed)
        sums = Sums({}, spec.probes)
        for i, (scene, scale) in enumerate(self.scenes(sums)):
            step = (first_probe << 32) + i
            parts = self._estimate(estimator, scene, step)
            self._without_graph = (
                self._now[0].alone
                and all(p.method == "closed_form" for p in parts.values())
                and self._recognised(self._now[0], self._now[1], scene.known)
            )
            self._add(sums, scene, parts, scale)
        return sums

    def _recognised(self, record: Forward, outputs: Any, known: KnownLoss | None) -> bool:
        """Whether a closed form is seen to apply without a graph."""
        tensor = output_tensor(outputs)
        return all(closed_form.seen_without_graph(c, tensor, known) for c in record.calls)

    def sweep_all(self, first_probe: int, probes: int | None = None) -> Sums:
        """Go over the data of all ranks once: the same sums on each."""
        parts = gathered(lambda: self.sweep(first_probe, probes), self.group)
        return functools.reduce(operator.add, parts)

    def scenes(self, sums: Sums | None = None) -> Iterator[tuple[Scene, tuple[float, float]]]:
        """Run the model over the data.

        Yields:
            for each batch the pass and its loss, with what the loss is multiplied by to be added up and what
            it adds to the divisor of the sum. Batches whose every target is ignored only go into ``sums``.
        """
        self._without_graph = False
        for i, (batch, other) in enumerate(self.batches):
            with torch.set_grad_enabled(not self._without_graph):
                outputs, targets, loss, record = self._forward(batch)
            known = known_loss(self.loss_fn, outputs, (targets,), {})
            if self._without_graph and not self._recognised(record, outputs, known):
                outputs, targets, loss, record = self._forward(batch)
                known = known_loss(self.loss_fn, outputs, (targets,), {})
            self._now = (record, outputs, targets)
            scene = Scene(
                record.calls,
                loss,
                output_tensor(outputs),
                known,
                targets if known else None,
                record.parameters,
                record.mode,
                self.scales,
            )
            if sums is not None:
                self._observe(sums, scene, samples_in(batch))
            if known is not None and known.reduction == "mean" and known.normaliser(outputs, targets) == 0:
                continue  # every target is ignored, and the mean over none is not a number
            _check_finite(loss)
            yield scene, self._weight(outputs, targets, loss, known, i == 0, other)

    def loss_again(self, inject: Inject | None = None, change: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The loss of the last batch with other inputs to the layer or another parameter; one forward pass."""
        record, outputs, targets = self._now
        with torch.no_grad():
            replayed = self.tap.replay(record, inject, change)
            return self._loss(replayed if outputs is record.outputs else output_tensor(replayed), targets)

    def _forward(self, batch: Batch) -> tuple[Any, Any, Tensor, Forward]:
        outputs, targets = self.batches.forward(self.model, batch)
        records, loss = self.tap.take(), self._loss(outputs, targets)
        return outputs, targets, loss, records[-1] if len(records) == 1 else self._joint(records, loss)

    def _joint(self, records: list[Forward], loss: Tensor) -> Forward:
        """Several forward passes behind one loss (two views of a batch) as one record."""
        if self.spec.method == "finite_difference":
            raise GraphError(
                f"finite differences repeat one forward pass, and forward= ran the model {len(records)} times a "
                "batch; use another method"
            )
        calls = depends_on(loss, [c for r in records for c in r.calls])
        return replace(records[-1], calls=calls, alone=False)

    def _loss(self, outputs: Any, targets: Any) -> Tensor:
        try:
            loss = self.loss_fn(outputs, targets)
        except IndexError as error:
            if "arget" not in str(error):
                raise
            raise LossError(
                f"{str(error).rstrip('.')}: a target lies outside the classes; mend the labels or set ignore_index"
            ) from error
        except TypeError as error:
            if isinstance(outputs, Tensor):
                raise
            raise DataError(
                f"the loss cannot take the model's outputs ({type(outputs).__name__}): {error}; pass "
                "forward=lambda model, batch: (outputs, targets) that picks the tensor"
            ) from error
        if not isinstance(loss, Tensor):
            raise LossError(f"the loss is {type(loss).__name__}, not a tensor")
        return loss

    def _estimate(self, estimator: Estimator, scene: Scene, step: int) -> dict[str, Contributions]:
        if self.spec.method != "finite_difference":
            try:
                with kept_whole(self.model):
                    return estimator(scene, step)
            except SecondDerivativeError as error:
                if self.spec.method != "auto" or self.spec.curvature != "hessian":
                    raise
                self.guards.falls_back(error)
        with torch.no_grad():
            return perturb.finite_difference(
                lambda old, new: self.loss_again(change=(old, new)),
                scene.loss,
                [Matrix.of(name, target) for name, target in self.tap.layers.items()],
                probes=estimator.spec.probes,
                adaptive=self.spec.adaptive,
                scales=self.scales,
                rng=Rng(self.seed, step),
            )

    def _weight(
        self,
        outputs: Any,
        targets: Any,
        loss: Tensor,
        known: KnownLoss | None,
        first: bool,
        other: Batch | None,
    ) -> tuple[float, float]:
        """What the batch's loss is multiplied by, and what the sum is divided by for it (0: it is not).

        A mean is turned back into a sum; the division follows at the end.
        """
        if known is not None and known.reduction != "sum":
            divisor = float(known.normaliser(outputs, targets))
            return (divisor, divisor) if known.reduction == "mean" else (1.0, divisor)
        if known is None and loss.ndim == 0 and first and other is None and several(self.group):
            raise LossError(
                "whether this loss is a mean or a sum over samples cannot be told from one batch a rank; give each "
                "rank two batches or more, or use a known loss"
            )
        if known is not None or (first and other is None):
            return (1.0, 0.0) if loss.ndim == 0 else (1.0, float(loss.numel()))
        if loss.ndim > 0:
            return 1.0, float(loss.numel())
        if first and self._additive is None:
            self._additive = self._how_it_adds_up(outputs, targets, loss, other)
        n = float(length(outputs))
        return (n, n) if self._additive == "mean" else (1.0, 0.0)

    def averages(self, scene: Scene) -> bool:
        """Whether the loss of a batch is a mean; an unknown one is tried on the batch given twice."""
        if scene.known is not None:
            return scene.known.reduction == "mean"
        if scene.loss.ndim > 0:
            return False
        _, outputs, targets = self._now
        with torch.no_grad():
            twice = float(self._loss(join(outputs, outputs), join(targets, targets)))
        once = float(scene.loss.detach())
        return abs(twice - once) <= abs(twice - 2 * once)

    def _how_it_adds_up(self, outputs: Any, targets: Any, loss: Tensor, other: Batch) -> str:
        """Whether an unknown loss is the mean or the sum over samples; tried on the first two batches."""
        with torch.no_grad():
            outputs_2, targets_2 = self.batches.forward(self.model, other)
            self.tap.take()
            loss_2 = float(self._loss(outputs_2, targets_2))
            both = float(self._loss(join(outputs, outputs_2), join(targets, targets_2)))
        n_1, n_2, loss_1 = length(outputs), length(outputs_2), float(loss.detach())
        close = (1e-9 if loss.dtype == torch.float64 else 1e-4) * (
            abs(loss_1) + abs(loss_2) + abs(both) + 1e-30
        )
        if abs((n_1 * loss_1 + n_2 * loss_2) / (n_1 + n_2) - both) < close:
            return "mean"
        if abs(loss_1 + loss_2 - both) < close:
            return "sum"
        raise LossError(
            "this loss over two batches is neither the mean nor the sum over their samples, so kappa of all the data "
            "cannot be put together from batches; give all data as one batch, or use a known loss"
        )

    def _observe(self, sums: Sums, scene: Scene, samples: int) -> None:
        """What does not depend on the targets."""
        names = [*dict.fromkeys(c.layer for c in scene.calls), *scene.parameters]
        for name in names:
            x, site = sums.layers.setdefault(name, LayerSums()), self._site(scene, name)
            x.energy += math.nan if site is None else site.energy()
            weight = Matrix.of(name, scene.parameters[name]).weight() if site is None else site.weight
            x.weight_norm = x.weight_norm or float(torch.linalg.vector_norm(weight.detach().double()))
        if scene.known is not None and scene.known.confidence and scene.outputs is not None:
            assert scene.targets is not None
            each = scene.known.confidence(scene.outputs, scene.targets)
            sums.confidence += float(each.sum(dtype=torch.float64))
            sums.confident += each.numel()
        sums.samples += samples

    def _add(
        self, sums: Sums, scene: Scene, parts: Mapping[str, Contributions], scale: tuple[float, float]
    ) -> None:
        factor, divisor = scale
        for name, part in parts.items():
            x = sums.layers[name]
            kappa, kappa_var = mean_and_variance(part.kappa, part.exact)
            trace, trace_var = mean_and_variance(part.trace, part.exact)
            x.kappa, x.kappa_var = x.kappa + factor * kappa, x.kappa_var + factor**2 * kappa_var
            x.trace, x.trace_var = x.trace + factor * trace, x.trace_var + factor**2 * trace_var
            x.method, x.exact = joined(x.method, part.method), x.exact and part.exact
        sums.add_loss(scene.loss, factor, divisor)

    def _site(self, scene: Scene, name: str) -> Site | None:
        calls = [c for c in scene.calls if c.layer == name]
        return Site.of(calls, scale=self.scales.get(name), constant=True) if calls else None

    def feature_scales(self) -> dict[str, Tensor]:
        """Standard deviation of each layer's features over the data, by one extra pass; 0 for those that never vary.

        Raises:
            DataError: if the data hold fewer than two rows of a layer's features.
        """
        self.batches.must_be_repeatable("normalize_features")
        total: dict[str, Moments] = {}
        for part in gathered(self._moments, self.group):
            for name, x in part.items():
                total[name] = total[name] + x.to(total[name].mean.device) if name in total else x
        for name, x in total.items():
            if x.count < 2:
                raise DataError(
                    f"the data hold {x.count} row of features of layer {name!r}: a standard deviation needs at least "
                    "two; give more samples, or leave normalize_features out"
                )
        return {name: std_of(x.squares / x.count, x.mean, x.dtype) for name, x in total.items()}

    def _moments(self) -> dict[str, "Moments"]:
        found: dict[str, Moments] = {}
        for batch, _ in self.batches:
            with torch.no_grad():
                self.batches.forward(self.model, batch)
            for call in [c for record in self.tap.take() for c in record.calls]:
                features = Site.of([call], constant=True).features.flatten(0, 2)
                phi = features.double()
                squares = phi.var(0, correction=0) * phi.shape[0]
                seen = Moments(phi.shape[0], phi.mean(0), squares, features.dtype)
                found[call.layer] = found[call.layer] + seen if call.layer in found else seen
        return found


@dataclass(frozen=True)
class Moments:
    """How many rows of features there were, their mean, summed squared deviations from it, and their dtype."""

    count: int
    mean: Float[Tensor, " m"]
    squares: Float[Tensor, " m"]
    dtype: torch.dtype

    def __add__(self, other: "Moments") -> "Moments":
        """Moments of both parts together (Chan et al. 1983)."""
        count, delta = self.count + other.count, other.mean - self.mean
        between = delta.square() * self.count * other.count / count
        return Moments(
            count, self.mean + delta * other.count / count, self.squares + other.squares + between, self.dtype
        )

    def to(self, device: torch.device) -> "Moments":
        """The same on another device."""
        return Moments(self.count, self.mean.to(device), self.squares.to(device), self.dtype)


def _check_finite(loss: Tensor) -> None:
    if not bool(torch.isfinite(loss.detach()).all()):
        raise NonFiniteError(
            f"the loss is {float(loss.detach().sum())} on a batch: check the model's weights, inputs, targets"
        )
