"""Relatives of kappa: sample by sample, by largest eigenvalues, and the feature robustness it comes from.

All of them leave the model as they found it, and take ``model``, ``loss_fn``, ``data`` (of a loss that is a mean or a
sum over samples), ``forward``, ``device`` and ``seed`` as :func:`relflat.relative_flatness` does.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from relflat.capture.outputs import output_tensor
from relflat.capture.resolve import Layer
from relflat.capture.uses import Matrix
from relflat.errors import ConfigError, LossError
from relflat.estimate.radius import Noise
from relflat.estimate.scene import Scene
from relflat.measure.batches import Batch, ForwardFn
from relflat.measure.sweep import Measurement, measuring
from relflat.options import Curvature, Options, checked
from relflat.rng import Rng
from relflat.theory.spectrum import Estimate, largest, matrix_of, one_of, product

__all__ = ["Estimate", "feature_robustness", "max_eigenvalue_flatness", "per_sample_flatness"]


@checked
def per_sample_flatness(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    data: Iterable[Batch] | Batch,
    *,
    layer: Layer,
    curvature: Curvature = "hessian",
    method: str = "auto",
    probes: int = 16,
    adaptive: bool = False,
    forward: ForwardFn | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> Float[Tensor, " n"]:
    """Kappa of each sample's own loss, in the order of the data (Walter et al., arXiv 2405.16918).

    For a mean reduction without class weights and ignored targets their mean is kappa of the whole. Confident
    samples are flat, right or wrong, so a small value says nothing about correctness.

    Arguments are those of :func:`relflat.relative_flatness`; ``probes`` are directions for each sample, and the
    methods ``"finite_difference"`` and ``"xtrace"`` are not for this, as they take all samples together.

    Returns:
        One value a sample, float64, on the CPU. Positions of a sample (tokens, pixels) are added.

    Raises:
        LossError: if samples are coupled after the layer, so that there are no shares.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,))
        >>> per_sample_flatness(model, nn.CrossEntropyLoss(), (x, y), layer="output").shape
        torch.Size([8])
    """
    if method in ("finite_difference", "xtrace"):
        raise ConfigError(
            f"method={method!r} takes all samples together, and each is wanted by itself; use 'auto', 'exact' or "
            "'probe'"
        )
    options = Options(curvature, method, probes, adaptive, measuring=True)
    found = []
    with measuring(model, loss_fn, data, layer, options, forward, device, seed) as measurement:
        for i, (scene, _) in enumerate(measurement.scenes()):
            parts = measurement.estimator(scene, i)
            part = parts[one_of(parts, layer)]
            n = scene.loss.numel() if scene.loss.ndim else _samples(scene)
            shares = part.kappa.detach().double().mean(0).cpu()
            if shares.numel() % n:
                raise LossError(
                    f"kappa of layer {layer!r} has {shares.numel()} shares for {n} samples: they are coupled after "
                    "it, so no sample has a share of its own"
                )
            found.append(shares.reshape(n, -1).sum(1) * (n if measurement.reduction.of_one(scene) == "mean" else 1))
    return torch.cat(found)


@checked
def max_eigenvalue_flatness(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    data: Iterable[Batch] | Batch,
    *,
    layer: Layer,
    rtol: float = 1e-4,
    max_products: int = 100,
    forward: ForwardFn | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> Estimate:
    """``sum_s ||w_s||^2 lambda_max(H_{s,s})`` (Petzka et al. 2021, the maximum-eigenvalue version), matrix-free.

    Lanczos with full reorthogonalisation on each of the d diagonal blocks, from products with the Hessian of
    the loss over all of the data: at most ``max_products`` a block, until the residual of its eigenvalue is below
    the share ``rtol`` of it. Each product is a forward and two backward passes over the data. ``model``, ``loss_fn``,
    ``data``, ``layer``, ``forward`` and ``device`` are those of :func:`relflat.relative_flatness`; ``seed`` is of the
    starting vectors.

    Returns:
        The value; ``stderr`` holds ``sum_s ||w_s||^2 r_s``, r_s the residual norms: that near to each value used
        there is an eigenvalue of its block, almost surely the largest from a random start.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,))
        >>> flat = max_eigenvalue_flatness(model, nn.CrossEntropyLoss(), (x, y), layer="output")
        >>> flat.value > 0 and flat.stderr <= 1e-3 * flat.value
        True
    """
    options = Options("hessian", measuring=True)
    value = error = 0.0
    with measuring(model, loss_fn, data, layer, options, forward, device, seed) as measurement:
        matrix, rng = matrix_of(measurement, layer), Rng(seed, 0)
        for row, w in enumerate(matrix.weight().detach()):
            block = functools.partial(_block, measurement, matrix, row)
            top, residual = largest(block, rng.normal(w).double(), rtol, max_products)
            norm2 = float(w.double().square().sum())
            value, error = value + norm2 * top, error + norm2 * residual
    return Estimate(value, error, "lanczos")


@checked
def feature_robustness(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    data: Iterable[Batch] | Batch,
    *,
    layer: Layer,
    radius: float,
    draws: int = 8,
    forward: ForwardFn | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> Estimate:
    """``E_A[L(phi + radius A phi) - L(phi)]``, A random orthogonal (Petzka et al. 2021, Def. 2, at finite radius).

    ``A phi`` is uniform on the sphere of radius ``||phi||``; it is drawn for each sample and position, together
    with its negative: ``draws`` pairs a batch, two or more for an error. For small radius and one position a sample
    the value is ``radius^2 / (2 m) kappa + O(radius^4)`` (I8); with tokens or pixels, which move independently, what
    couples them is not in it. ``model``, ``loss_fn``, ``data``, ``layer``, ``forward`` and ``device`` are those of
    :func:`relflat.relative_flatness`; ``seed`` is of the noise.

    Returns:
        The value and its standard error. Cost: ``1 + 2 draws`` forward passes over the data.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,))
        >>> rise = feature_robustness(model, nn.CrossEntropyLoss(), (x, y), layer="output", radius=0.1)
        >>> rise.value > 0
        True
    """
    options = Options("hessian", measuring=True)
    totals, divisor = torch.zeros(draws, dtype=torch.float64), 0.0
    with measuring(model, loss_fn, data, layer, options, forward, device, seed) as measurement:
        for i, (scene, (factor, part)) in enumerate(measurement.scenes()):
            assert scene.replay is not None
            divisor += part
            for k in range(draws):
                for sign in (1.0, -1.0):
                    with torch.no_grad():
                        moved = scene.replay.loss(inject=Noise(sign * radius, Rng(seed, i * draws + k)))
                    totals[k] += factor * float((moved - scene.loss).sum()) / 2
    totals = totals / (divisor or 1.0)
    stderr = float(totals.std()) / math.sqrt(draws) if draws > 1 else math.nan
    return Estimate(float(totals.mean()), stderr, f"sphere(radius={radius:g}, {draws} pairs)")


# -- how ---------------------------------------------------------------------------------------------------


def _samples(scene: Scene) -> int:
    tensor = scene.outputs if scene.outputs is not None else output_tensor(scene.calls[0].output)
    return tensor.shape[0] if tensor is not None and tensor.ndim > 1 else 1


def _block(measurement: Measurement, matrix: Matrix, row: int, v: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """``H_{s,s} v`` of the loss over all of the data, s the row."""
    direction = torch.zeros_like(matrix.weight(), dtype=v.dtype)
    direction[row] = v
    return product(measurement, matrix, direction)[row]
