"""How well blurred training features stand for the test data (Petzka et al. 2021)."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from relflat.capture.resolve import Layer
from relflat.errors import ConfigError
from relflat.measure.batches import Batch, ForwardFn, samples_in
from relflat.measure.sweep import Measurement, measuring
from relflat.options import Options, checked
from relflat.rng import Rng
from relflat.theory.relatives import Estimate


@checked
def representativeness(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    train: Iterable[Batch] | Batch,
    test: Iterable[Batch] | Batch,
    *,
    layer: Layer,
    bandwidth: float | None = None,
    draws: int = 8,
    forward: ForwardFn | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> Estimate:
    """Test loss minus the training loss smoothed by a Gaussian kernel in feature space (Petzka et al. 2021).

    The generalisation gap is this plus the feature robustness at the same kernel.

    Args:
        model: the network.
        loss_fn: a loss that is a mean or a sum over samples.
        train: training batches.
        test: test batches.
        layer: exactly one layer with real inputs.
        bandwidth: standard deviation of the kernel in every feature; by default Scott's rule,
            ``n^(-1/(m+4))`` times the standard deviation of the feature, for a dense layer.
        draws: samples of the kernel for each training sample, two or more for an error.
        forward: ``forward(model, batch) -> (outputs, targets)``.
        device: where to move batches.
        seed: of the kernel's samples.

    Returns:
        The value and its standard error over draws. Cost: ``draws`` passes over train, one over test.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,))
        >>> rep = representativeness(model, nn.CrossEntropyLoss(), (x, y), (x, y), layer="output", bandwidth=1e-6)
        >>> abs(rep.value) < 1e-3
        True
    """
    options, how = Options("hessian", measuring=True), (forward, device, seed)
    with measuring(model, loss_fn, test, layer, options, *how) as measurement:
        total = divisor = 0.0
        for scene, (factor, part) in measurement.scenes():
            total, divisor = total + factor * float(scene.loss.detach().sum()), divisor + part
    smoothed, weight = torch.zeros(draws, dtype=torch.float64), 0.0
    with measuring(model, loss_fn, train, layer, options, *how) as measurement, torch.no_grad():
        measurement.tap.must_have_features("representativeness")
        width = _scott(measurement) if bandwidth is None else torch.tensor(float(bandwidth))
        for i, (scene, (factor, part)) in enumerate(measurement.scenes()):
            assert scene.replay is not None
            weight += part
            for k in range(draws):
                blur = functools.partial(_blurred, width, Rng(seed, i * draws + k))
                smoothed[k] += factor * float(scene.replay.loss(inject=blur).sum())
    smoothed = smoothed / (weight or 1.0)
    stderr = float(smoothed.std()) / math.sqrt(draws) if draws > 1 else math.nan
    return Estimate(total / (divisor or 1.0) - float(smoothed.mean()), stderr, f"kde({draws} draws)")


def _scott(measurement: Measurement) -> Float[Tensor, " m"]:
    """Scott's rule for the bandwidth of each feature."""
    measurement.batches.must_be_repeatable("Scott's rule for the bandwidth")
    measurement.measure_scales()
    n, width = 0, 0
    for scene, _ in measurement.scenes():
        n, width = n + (samples_in(scene.calls[0].phi) or 1), scene.calls[0].phi.shape[-1]
    scales = measurement.scales
    scale = next(iter(scales.values()))
    if len(scales) != 1 or width != scale.numel():
        raise ConfigError(f"Scott's rule needs one dense layer, and {list(scales)} were given; give bandwidth=")
    return scale * n ** (-1 / (scale.numel() + 4))


def _blurred(width: Tensor, rng: Rng, module: nn.Module, x: Tensor) -> Tensor:
    """The input of the layer with noise of the kernel."""
    return x + (width.to(x.device) * rng.normal(x)).to(x.dtype)
