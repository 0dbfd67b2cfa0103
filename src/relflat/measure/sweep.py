"""A model, a loss and data under measurement: one sweep over the batches, on one process or several."""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from relflat.capture.calls import depends_on
from relflat.capture.matrix import Matrix
from relflat.capture.outputs import output_tensor
from relflat.capture.resolve import Layer
from relflat.capture.tap import Tap
from relflat.curvature.output_space import OutputSpace
from relflat.curvature.scales import std_of
from relflat.distributed import gathered, kept_whole, reshard, several
from relflat.errors import DataError, GraphError, LossError, NonFiniteError
from relflat.estimate.closed_form import seen_without_graph
from relflat.estimate.contributions import Contributions
from relflat.estimate.estimator import Estimator
from relflat.estimate.replay import Replay
from relflat.estimate.scene import Scene
from relflat.loss.criterion import Criterion
from relflat.measure.additivity import Weight, kind_of_unknown, weight_of_known, weight_of_unknown
from relflat.measure.batches import Batch, Batches, ForwardFn, device_of, samples_in, undisturbed
from relflat.measure.moments import Moments
from relflat.measure.sums import LayerSums, Sums, joined, mean_and_variance
from relflat.options import Options

_REMEDY = "pass forward=lambda model, batch: (outputs, targets) that picks the tensor"


@contextmanager
def measuring(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    data: Iterable[Batch] | Batch,
    layer: Layer,
    options: Options,
    *,
    forward: ForwardFn | None,
    device: torch.device | str | None,
    seed: int,
    group: Any = None,
) -> Iterator["Measurement"]:
    """Tap a model for a measurement: evaluation mode and nothing disturbed inside, hooks gone after it."""
    if torch.is_inference_mode_enabled():
        raise GraphError("torch.inference_mode() is on, and curvature needs gradients; leave it out")
    estimator = Estimator(options, seed)
    recording = [False]
    tap = Tap(model, layer, when=lambda: recording[0])
    place = device_of(model) if device is None else torch.device(device)
    try:
        if options.normalize_features:
            tap.must_have_features("normalize_features")
        batches = Batches(data, forward, place)
        with undisturbed(model):
            recording[0] = True
            yield Measurement(model, loss_fn, tap, batches, estimator, group)
    finally:
        tap.close()
        reshard(model)


@dataclass
class Measurement:
    """A model, a loss and data under measurement, one sweep at a time.

    Attributes:
        group: ranks that measure other shares of the data, or None.
        scales: standard deviation of features by layer, for ``normalize_features``.
    """

    model: nn.Module
    loss_fn: Callable[..., Any]
    tap: Tap
    batches: Batches
    estimator: Estimator
    group: Any = None
    scales: dict[str, Tensor] = field(default_factory=dict)
    _without_graph: bool = False  # whether later batches can run under no_grad
    _kind: str | None = None  # how an unknown loss adds up over batches

    @property
    def options(self) -> Options:
        """What is measured."""
        return self.estimator.options

    def sweep(self, first_probe: int = 0, probes: int | None = None) -> Sums:
        """Go over the data of all ranks once: the same sums on each.

        Args:
            first_probe: how many probes were drawn in earlier sweeps.
            probes: how many to draw; by default as the options say.
        """
        parts = gathered(lambda: self._share(first_probe, probes or self.options.probes), self.group)
        return functools.reduce(operator.add, parts)

    def _share(self, first_probe: int, probes: int) -> Sums:
        """This rank's data."""
        options, sums = replace(self.options, probes=probes), Sums({}, probes)
        for i, (scene, weight) in enumerate(self.scenes(sums)):
            with kept_whole(self.model):
                parts = self.estimator(scene, (first_probe << 32) + i, options)
            closed = all(p.method == "closed_form" for p in parts.values())
            self._without_graph = closed and _recognised(scene)
            _add(sums, scene, parts, weight)
        return sums

    def scenes(self, sums: Sums | None = None) -> Iterator[tuple[Scene, Weight]]:
        """Run the model over the data.

        Yields:
            for each batch the pass and its loss, with what the loss is multiplied by to be added up and what
            it adds to the divisor of the sum. Batches whose every target is ignored only go into ``sums``.
        """
        self._without_graph = False
        for i, (batch, other) in enumerate(self.batches):
            with torch.set_grad_enabled(not self._without_graph):
                scene = self._scene(batch)
            if self._without_graph and not _recognised(scene):
                scene = self._scene(batch)
            if sums is not None:
                self._observe(sums, scene, samples_in(batch))
            if scene.known is not None and scene.known.reduction == "mean" and weight_of_known(scene)[1] == 0:
                continue  # every target is ignored, and the mean over none is not a number
            if not bool(torch.isfinite(scene.loss.detach()).all()):
                raise NonFiniteError(
                    f"the loss is {float(scene.loss.detach().sum())} on a batch: check the model's weights, inputs, "
                    "targets"
                )
            yield scene, self._weight(scene, other, first=i == 0)

    def _scene(self, batch: Batch) -> Scene:
        outputs, targets = self.batches.forward(self.model, batch)
        forwards, criterion = self.tap.take(), Criterion(self.loss_fn, (targets,), remedy=_REMEDY)
        loss, last, known = criterion(outputs), forwards[-1], criterion.known(outputs)
        calls = [c for f in forwards for c in f.calls]
        return Scene(
            loss=loss,
            calls=calls if len(forwards) == 1 else depends_on(loss, calls),
            outputs=output_tensor(outputs),
            known=known,
            parameters=last.parameters,
            mode=last.mode,
            scales=self.scales,
            replay=Replay(self.tap, forwards, outputs, criterion),
        )

    def _weight(self, scene: Scene, other: Batch | None, *, first: bool) -> Weight:
        if scene.known is not None:
            return weight_of_known(scene)
        if scene.loss.ndim > 0 or not first:
            return weight_of_unknown(scene, self._kind or "sum")
        if other is None:
            if several(self.group):
                raise LossError(
                    "whether this loss is a mean or a sum over samples cannot be told from one batch a rank; give "
                    "each rank two batches or more, or use a known loss"
                )
            self._kind = "only"
        elif self._kind is None:
            with torch.no_grad():
                self._kind = kind_of_unknown(scene, self._scene(other))
        return weight_of_unknown(scene, self._kind or "sum")

    def _observe(self, sums: Sums, scene: Scene, samples: int) -> None:
        """What does not depend on the curvature."""
        for name in scene.layers:
            x, calls = sums.layers.setdefault(name, LayerSums()), scene.calls_of(name)
            space = OutputSpace.of(calls, scale=self.scales.get(name), constant=True) if calls else None
            x.energy += math.nan if space is None else space.energy()
            weight = Matrix.of(name, scene.parameters[name]).weight() if space is None else space.weight
            x.weight_norm = x.weight_norm or float(torch.linalg.vector_norm(weight.detach().double()))
        if scene.known is not None and scene.known.confidence is not None:
            each = scene.known.confidence()
            sums.confidence += float(each.sum(dtype=torch.float64))
            sums.confident += each.numel()
        sums.samples += samples

    # -- features --------------------------------------------------------------------------------------------

    def measure_scales(self) -> None:
        """Standard deviation of each layer's features over the data, by one extra pass; 0 for those that never vary.

        Raises:
            DataError: if the data hold fewer than two rows of a layer's features.
        """
        self.batches.must_be_repeatable("normalize_features")
        total: dict[str, Moments] = {}
        for part in gathered(self._moments, self.group):
            for name, x in part.items():
                total[name] = total[name] + x if name in total else x
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
            with torch.no_grad():
                self.batches.forward(self.model, batch)
            for call in [c for record in self.tap.take() for c in record.calls]:
                seen = Moments.of(OutputSpace.of([call], constant=True).features.flatten(0, 2))
                found[call.layer] = found[call.layer] + seen if call.layer in found else seen
        return found


def _recognised(scene: Scene) -> bool:
    """Whether closed forms are seen to apply without a graph, so that later batches need none."""
    one_pass = scene.replay is not None and len(scene.replay.forwards) == 1
    return one_pass and all(seen_without_graph(c, scene.known) for c in scene.calls)


def _add(sums: Sums, scene: Scene, parts: Mapping[str, Contributions], weight: Weight) -> None:
    factor, divisor = weight
    for name, part in parts.items():
        x = sums.layers[name]
        kappa, kappa_var = mean_and_variance(part.kappa, part.exact)
        trace, trace_var = mean_and_variance(part.trace, part.exact)
        x.kappa, x.kappa_var = x.kappa + factor * kappa, x.kappa_var + factor**2 * kappa_var
        x.trace, x.trace_var = x.trace + factor * trace, x.trace_var + factor**2 * trace_var
        x.method, x.exact = joined(x.method, part.method), x.exact and part.exact
    sums.add_loss(scene.loss, factor, divisor)
