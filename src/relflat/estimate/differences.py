"""Kappa by finite differences of the loss: needs no second derivative, so any operation and precision will do."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from relflat.capture.matrix import Matrix
from relflat.curvature.scales import divisor
from relflat.curvature.weight_space import random_direction
from relflat.estimate.contributions import Contributions
from relflat.estimate.replay import Replay
from relflat.options import Options
from relflat.rng import Rng

_STENCIL = ((-2, -1.0), (-1, 16.0), (1, 16.0), (2, -1.0))  # of 12 h^2 f'', with -30 at the centre


def finite_difference(
    replay: Replay, loss: Tensor, matrix: Matrix, scale: Float[Tensor, " m"] | None, options: Options, rng: Rng
) -> Contributions:
    """Kappa by I4, the second derivative along ``W R`` taken from a five-point stencil in the loss.

    R is a matrix of independent signs (diagonal if adaptive), one for the whole batch, so coupled samples are
    right too. Each probe costs four forward passes. Truncation error O(h^4), rounding error about
    ``eps m / h^2`` times the loss (h the relative step: 1e-4 in float64, 7e-2 in float32); neither is part of
    the standard error. Where a kink (ReLU) lies within a step its change of slope counts as curvature: prefer
    float64 there.
    """
    base, weight = loss.double().sum(), matrix.weight()
    m, eps = weight.shape[-1], torch.finfo(weight.dtype).eps
    h = eps ** (1 / 4 if weight.dtype == torch.float64 else 1 / 6) / (1.0 if options.adaptive else math.sqrt(m))
    scale = weight.new_ones(()) if scale is None else scale.to(weight.dtype)
    values = []
    for _ in range(options.probes):
        # in scaled features W R is W s R / s
        direction = random_direction(weight * scale, options.adaptive, rng) / divisor(scale)
        step = matrix.back(direction)
        total = -30.0 * base
        for k, factor in _STENCIL:
            moved = replay.loss(change=(matrix.parameter, matrix.parameter + k * h * step))
            total = total + factor * moved.double().sum()
        values.append(total / (12 * h * h))
    method = f"finite_difference(hessian, {options.probes})"
    return Contributions(torch.stack(values)[:, None], None, method, False)
