"""Kappa by finite differences of the loss: needs no second derivative, so any operation and precision will do."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from relflat.capture.uses import Matrix
from relflat.curvature.scales import divisor
from relflat.curvature.weight_space import random_direction
from relflat.estimate.contributions import Contributions
from relflat.estimate.replay import Replay
from relflat.options import Options
from relflat.rng import Rng


def finite_difference(
    replay: Replay, loss: Tensor, matrix: Matrix, scale: Float[Tensor, " m"] | None, options: Options, rng: Rng
) -> Contributions:
    """Kappa by I4, the second derivative along ``W R`` taken from a five-point stencil in the loss.

    R is a matrix of independent signs (diagonal if adaptive), one for the whole batch, so coupled samples are
    right too. Each probe costs four forward passes. Truncation error O(h^4), rounding error about
    ``eps m / h^2`` times the loss (h the relative step: 1e-4 in float64, 7e-2 in float32). Both are seen in the
    difference of the three-point formulas D(h) and D(2h) of which this is ``(4 D(h) - D(2h)) / 3``: it is off by up
    to 7/3 of it, where a kink (ReLU) lies in the middle and its change of slope counts as curvature, as ``1 / h``;
    by 5/3 for the rounding of the loss in the middle; by less for other rounding and truncation.
    """
    base, weight = loss.double().sum(), matrix.weight()
    m, eps = weight.shape[-1], torch.finfo(weight.dtype).eps
    h = eps ** (1 / 4 if weight.dtype == torch.float64 else 1 / 6) / (1.0 if options.adaptive else math.sqrt(m))
    scale = weight.new_ones(()) if scale is None else scale.to(weight.dtype)
    values, differences = [], []
    for _ in range(options.probes):
        # in scaled features W R is W s R / s
        direction = random_direction(weight * scale, options.adaptive, rng) / divisor(scale)
        step = matrix.back(direction)
        near, far = (_second(replay, base, matrix, step, k * h) for k in (1, 2))
        values.append((4 * near - far) / 3)
        differences.append((near - far).detach())
    method = f"finite_difference(hessian, {options.probes})"
    bias = 0.0
    if options.measuring:
        least = torch.finfo(loss.dtype).eps * abs(float(base.detach())) / h**2  # where no difference shows at all
        bias = math.hypot(7 / 3 * float(torch.stack(differences).square().mean().sqrt()), least)
    return Contributions(torch.stack(values)[:, None], None, method, False, bias=bias)


def _second(replay: Replay, base: Tensor, matrix: Matrix, step: Tensor, h: float) -> Tensor:
    """The three-point formula for the second derivative of the loss along a step."""
    ends = [replay.loss(change=(matrix.parameter, matrix.parameter + k * step)).double().sum() for k in (h, -h)]
    return (ends[0] - 2 * base + ends[1]) / h**2
