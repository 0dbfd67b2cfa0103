"""The loss along random linear changes of a layer's features: what kappa is the curvature of."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from relflat.capture.resolve import Layer
from relflat.errors import ConfigError
from relflat.measure.api import relative_flatness
from relflat.measure.batches import Batch, ForwardFn
from relflat.measure.sweep import Measurement, measuring
from relflat.measure.xtrace import Coordinates
from relflat.options import Options, checked
from relflat.result import Flatness
from relflat.rng import Rng
from relflat.theory.spectrum import one_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class LossAlong:
    """The loss of a network as one layer's features change linearly at random.

    Attributes:
        flat: kappa of the layer, of the same loss and data.
        radii: changes of the features relative to their size, both ways.
        losses: the loss for each direction (rows) and radius.
        features: m, how many features the layer reads.
    """

    flat: Flatness
    radii: Float[Tensor, " k"]
    losses: Float[Tensor, "n k"]
    features: int

    def parabola(self) -> Float[Tensor, " k"]:
        """``loss + radius^2 kappa / (2 m)``: the mean over directions to second order."""
        return self.flat.loss + self.radii.square() * self.flat.value / (2 * self.features)

    def plot(self, *, ax: "Axes | None" = None) -> "Axes":
        """Draw it: :func:`relflat.plot.landscape`."""
        from relflat.plot import landscape

        return landscape(self, ax=ax)


@checked
def loss_along(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    data: Iterable[Batch] | Batch,
    *,
    layer: Layer,
    radius: float = 1.0,
    draws: int = 8,
    points: int = 11,
    forward: ForwardFn | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> LossAlong:
    """The loss along ``W (I + r R)``, R an m x m matrix of independent normal numbers of variance ``1/m``.

    ``R phi`` is as long as the features phi, on average, so r is how much they change relative to their size. To
    second order the mean over R is ``loss + r^2 kappa / (2 m)`` (I8): kappa is the curvature of this picture, and
    what the picture shows further out is what kappa does not. A weight that is used elsewhere changes there too.

    ``model``, ``loss_fn``, ``data``, ``layer``, ``forward`` and ``device`` are those of
    :func:`relflat.relative_flatness`; ``radius`` is the largest r, ``draws`` is how many directions there are,
    ``points`` how many values of r from ``-radius`` to ``radius``; ``seed`` is of the directions.

    Returns:
        The losses, with kappa; the model is left as it was. Cost: ``draws * points`` forward passes over the data,
        and those of kappa.

    Raises:
        ConfigError: for fewer points than 3.
        LayerError: if the weight is computed from other parameters, as by an adapter.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,))
        >>> along = loss_along(model, nn.CrossEntropyLoss(), (x, y), layer="output", points=3)
        >>> along.losses.shape
        torch.Size([8, 3])
    """
    if points < 3:
        raise ConfigError(f"points={points}: give 3 or more values of r")
    flat = relative_flatness(model, loss_fn, data, layer=layer, forward=forward, device=device, seed=seed)
    options = Options("hessian", measuring=True)
    with measuring(model, loss_fn, data, layer, options, forward, device, seed) as measurement:
        measurement.batches.must_be_repeatable("loss_along")
        scene, _ = next(measurement.scenes())
        (subject,) = measurement.estimator.subjects(scene.only([one_of(scene.layers, layer)]))
        matrix = subject.matrix
        W = matrix.weight().detach()
        radii, m = torch.linspace(-radius, radius, points, dtype=torch.float64), W.shape[-1]
        coordinates = Coordinates(W, adaptive=False)  # W R is, in distribution, F of W W' = F F' times fewer numbers
        losses = torch.empty(draws, points, dtype=torch.float64)
        for k in range(draws):
            step = matrix.back(coordinates.change(Rng(seed, k).normal(W.new_empty(coordinates.size)) / math.sqrt(m)))
            for i, r in enumerate(radii.tolist()):
                with _moved(matrix.parameter, r * step):
                    losses[k, i] = _loss(measurement)
    return LossAlong(flat, radii, losses, m)


@contextmanager
@torch.no_grad()
def _moved(parameter: Tensor, step: Tensor) -> Iterator[None]:
    """The parameter with something added, meanwhile."""
    before = parameter.detach().clone()
    try:
        parameter.add_(step)
        yield
    finally:
        parameter.copy_(before)


def _loss(measurement: Measurement) -> float:
    """The loss over all of the data."""
    total = divisor = 0.0
    for scene, (factor, part) in measurement.scenes():
        total, divisor = total + factor * float(scene.loss.detach().sum()), divisor + part
    return total / (divisor or 1.0)
