"""A model, a loss and data under measurement: one sweep over the batches, on one process or several."""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from relflat.capture.calls import depends_on
from relflat.capture.kinds import weight_of as weight_tensor
from relflat.capture.outputs import output_tensor
from relflat.capture.resolve import Layer
from relflat.capture.tap import Tap
from relflat.curvature.output_space import OutputSpace
from relflat.curvature.scales import std_of
from relflat.distributed import gathered, kept_whole, reshard
from relflat.errors import DataError, GraphError, NonFiniteError
from relflat.estimate.closed_form import seen_without_graph
from relflat.estimate.estimator import Estimator
from relflat.estimate.replay import Replay, plain_kernels
from relflat.estimate.scene import Scene
from relflat.loss.criterion import Criterion
from relflat.measure.batches import Batch, Batches, ForwardFn, Reduction, Weight, samples_in, weight_of
from relflat.measure.sums import LayerSums, Moments, Sum, Sums, added, no_data
from relflat.measure.undisturbed import backward_passes, evaluating
from relflat.options import Options
from relflat.rng import rng_preserved

Look = Callable[[int, Scene, float, Sums], None]
"""What to do with a batch: its number, the pass, what its loss is multiplied by, and where to add things up."""

_REMEDY = "pass forward=lambda model, batch: (outputs, targets) that picks the tensor"


@contextmanager
def measuring(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    data: Iterable[Batch] | Batch,
    layer: Layer,
    options: Options,
    forward: ForwardFn | None,
    device: torch.device | str | None,
    seed: int,
    group: Any = None,
) -> Iterator["Measurement"]:
    """Tap a model for a measurement: evaluation mode and nothing disturbed inside, hooks gone after it."""
    if torch.is_inference_mode_enabled():
        raise GraphError("torch.inference_mode() is on, and curvature needs gradients; leave it out")
    estimator = Estimator(options, seed)
    tap = Tap(model, layer, measuring=True)
    try:
        tap.needs_features = options.normalize_features
        estimator.must_suit(tap)
        place = getattr(next(model.parameters(), None), "device", None) if device is None else device
        batches = Batches(data, forward, place)
        with evaluating(model), rng_preserved(), torch.enable_grad():
            yield Measurement(model, loss_fn, tap, batches, estimator, group)
    finally:
        tap.close()
        reshard(model)


@dataclass
class Measurement:
    """A model, a loss and data under measurement, one sweep at a time."""

    model: nn.Module
    loss_fn: Callable[..., Any]
    tap: Tap
    batches: Batches
    estimator: Estimator
    group: Any  # ranks that measure other shares of the data, or None
    scales: dict[str, Tensor] = field(default_factory=dict)  # of features by layer, for normalize_features
    _without_graph: bool = False  # whether later batches can run under no_grad
    _differentiates: bool | None = None  # whether the model's own forward does; not known before its first
    reduction: Reduction = field(default_factory=Reduction)  # how an unknown loss adds up over batches

    def sweep(self, look: Look, probes: int) -> Sums:
        """Go over the data of all ranks once: the same sums, with what ``look`` added for each batch, on each."""

        def share() -> Sums:
            sums = Sums({}, probes)
            for i, (scene, weight) in enumerate(self.scenes(sums)):
                with kept_whole(self.model), torch.autocast(scene.loss.device.type, enabled=False):
                    look(i, scene, weight[0], sums)
                sums.add_loss(scene.loss, *weight)
            return sums

        return functools.reduce(operator.add, gathered(share, self.group))

    def estimate(self, drawn: int, i: int, scene: Scene, factor: float, sums: Sums) -> None:
        """Add a batch's contributions, of other probes than those drawn in earlier sweeps."""
        parts = self.estimator(scene, (drawn << 32) + i, replace(self.estimator.options, probes=sums.probes))
        self._without_graph = _recognised(scene) and all(p.method == "closed_form" for p in parts.values())
        for name in scene.layers:
            p = parts[name]  # every one of them
            kappa = Sum.of(p.kappa, exact=p.exact, variances=p.variances[0], bias=p.bias)
            trace = Sum.of(p.trace, exact=p.exact, variances=p.variances[1])
            sums.layers[name] += LayerSums(kappa * factor, trace * factor, method=p.method, exact=p.exact)

    def scenes(self, sums: Sums | None = None) -> Iterator[tuple[Scene, Weight]]:
        """Run the model over the data.

        Yields:
            for each batch the pass and its loss, with what the loss is multiplied by to be added up and what
            it adds to the divisor of the sum. Batches whose every target is ignored only go into ``sums``.
        """
        self._without_graph, before, samples = False, None, 0
        for batch, later in self.batches:
            with self._graph(needed=not self._without_graph):
                scene = self._scene(batch)
            if self._without_graph and not _recognised(scene):
                scene = self._scene(batch)
            n = samples_in(batch) or (1 if scene.outputs is None else len(scene.outputs))
            samples += n
            if sums is not None:
                self._observe(sums, scene)
                sums.samples += n
            if scene.known and scene.known.reduction == "mean" and weight_of(scene, "mean")[1] == 0:
                continue  # every target is ignored, and the mean over none is not a number
            _must_be_finite(scene.loss.detach())
            yield scene, weight_of(scene, self._reduction_of(scene, before, later))
            before = scene
        if before is None and sums is None:  # those that add up see it from their sums
            raise no_data(samples)

    def _graph(self, *, needed: bool) -> torch.set_grad_enabled:
        """Record a graph where it is needed: also for a model whose forward differentiates, or may do so."""
        return torch.set_grad_enabled(needed or self._differentiates is not False)

    def _run(self, batch: Batch) -> tuple[Any, Any]:
        if self._differentiates is not None:
            return self.batches.forward(self.model, batch)
        before = backward_passes()
        found = self.batches.forward(self.model, batch)
        self._differentiates = backward_passes() > before + 1
        return found

    def _scene(self, batch: Batch) -> Scene:
        with plain_kernels() if self.estimator.plain else nullcontext():
            outputs, targets = self._run(batch)
            criterion = Criterion(self.loss_fn, (targets,), remedy=_REMEDY).eager
            loss, known = criterion(outputs), criterion.known(outputs)
        forwards, tensor = self.tap.take(), output_tensor(outputs)
        if self.tap.unsettled:
            self.tap.settle(forwards, loss, tensor)
        calls = [c for f in forwards for c in f.calls]
        again = functools.partial(self.batches.forward, batch=batch)
        return Scene.of(
            forwards,
            loss,
            calls if len(forwards) == 1 else depends_on(loss, calls),
            outputs=tensor,
            given=outputs,
            known=known,
            scales=self.scales,
            replay=Replay(self.tap, forwards, outputs, criterion, again=again),
            plain=self.estimator.plain,
        ).read()

    def _reduction_of(self, scene: Scene, before: Scene | None, later: Iterator[Batch]) -> str:
        """``"mean"``, ``"sum"`` or ``"none"``; an unknown loss is tried on batches to come until they tell."""
        if (scene.known is not None and scene.known.divisor is not None) or scene.loss.ndim > 0:
            return self.reduction.of_one(scene)
        if before is not None:
            self.reduction.compare(before, scene)
        alone = before is None
        with self._graph(needed=False):
            while self.reduction.found is None and (other := next(later, None)) is not None:
                alone = False
                self.reduction.compare(scene, self._scene(other))
        if alone and (self.group is None or dist.get_world_size(self.group) == 1):
            return "sum"  # of one batch they are the same
        return self.reduction.found or self.reduction.untold()

    def _observe(self, sums: Sums, scene: Scene) -> None:
        """What does not depend on the curvature."""
        for name in scene.layers:
            x, calls = sums.layers.setdefault(name, LayerSums()), scene.calls_of(name)
            space = OutputSpace.of(calls, scale=self.scales.get(name), constant=True) if calls else None
            x.energy += math.nan if space is None else space.energy()
            weight = weight_tensor(scene.parameters[name]) if space is None else space.weight
            x.weight_norm = x.weight_norm or float(torch.linalg.vector_norm(weight.detach().double()))
        if scene.known is not None and scene.known.confidence is not None:
            each = scene.known.confidence()
            sums.confidence += float(each.sum(dtype=torch.float64))
            sums.confident += each.numel()

    # -- features --------------------------------------------------------------------------------------------

    def prepare(self, repeated: str | None) -> None:
        """Refuse data that can be gone over only once where something needs more; measure feature scales."""
        if repeated is not None:
            self.batches.must_be_repeatable(repeated)
        if self.estimator.options.normalize_features:
            self.measure_scales()

    def measure_scales(self) -> None:
        """Standard deviation of features over the data, by one extra pass; 0 for those that never vary."""
        self.batches.must_be_repeatable("normalize_features")
        if self.tap.unsettled:
            next(self.scenes(Sums({}, 1)), None)  # a rank may have no data
        total = functools.reduce(added, gathered(self._moments, self.group))
        for name, x in total.items():
            if x.count < 2:
                raise DataError(
                    f"the data hold {x.count} row of features of layer {name!r}: a standard deviation needs at least "
                    "two; give more samples, or leave normalize_features out"
                )
        self.scales = {name: std_of(x.squares / x.count, x.mean, x.dtype) for name, x in total.items()}

    def _moments(self) -> dict[str, Moments]:
        found: dict[str, Moments] = {}
        for batch, _ in self.batches:
            with self._graph(needed=False):
                self._run(batch)
            for call in [c for record in self.tap.take() for c in record.calls]:
                features = OutputSpace.of([call], constant=True).features
                found = added(found, {call.layer: Moments.of(features.flatten(0, 2))})
        return found


def _recognised(scene: Scene) -> bool:
    """Whether closed forms are seen to apply without a graph, so that later batches need none."""
    replay = scene.replay
    if replay is None or len(replay.forwards) != 1 or replay.criterion is None:
        return False
    by_function = replay.criterion.known(replay.outputs) is not None  # not by the graph
    return by_function and all(seen_without_graph(c, scene.known) for c in scene.calls)


def _must_be_finite(loss: Tensor) -> None:
    if not bool(torch.isfinite(loss).all()):
        raise NonFiniteError(
            f"the loss is {float(loss.sum())} on a batch: check the model's weights, inputs, targets"
        )
