"""Perturbed forward passes: finite differences of the loss, and the finite-radius penalty.

Both look at the loss of a slightly different network and need no second derivative, so they work with any
operation and under any precision.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from relflat.capture.calls import Call, same_values
from relflat.capture.kinds import Kind
from relflat.curvature.output_space import divisor, std_of_rows
from relflat.curvature.weight_space import Matrix, random_direction
from relflat.errors import ConfigError
from relflat.estimate.probes import Contributions
from relflat.rng import Rng

_STENCIL = ((-2, -1.0), (-1, 16.0), (1, 16.0), (2, -1.0))


def finite_difference(
    run: Callable[[Tensor, Tensor], Tensor],
    loss: Tensor,
    matrices: Sequence[Matrix],
    *,
    probes: int,
    adaptive: bool,
    scales: Mapping[str, Tensor],
    rng: Rng,
) -> dict[str, Contributions]:
    """Kappa by I4, the second derivative along ``W R`` taken from a five-point stencil in the loss.

    R is a matrix of independent signs (diagonal if adaptive), one for the whole batch, so coupled samples are
    right too. Each probe and layer costs four forward passes. Truncation error O(h^4), rounding error about
    ``eps m / h^2`` times the loss (h the relative step: 1e-4 in float64, 7e-2 in float32); neither is part of
    the standard error. Where a kink (ReLU) lies within a step its change of slope counts as curvature: prefer
    float64 there.

    Args:
        run: ``(parameter, new value) -> loss`` of one more forward pass with that parameter replaced.
        loss: the loss without change.
        matrices: the weights.
        probes: directions for each weight.
        adaptive: whether R is diagonal.
        scales: feature scales of ``normalize_features`` by layer, or empty.
        rng: source of the directions.
    """
    found: dict[str, Contributions] = {}
    base = loss.double().sum()
    for matrix in matrices:
        weight = matrix.view(matrix.parameter)
        m, eps = weight.shape[1], torch.finfo(weight.dtype).eps
        h = eps ** (1 / 4 if weight.dtype == torch.float64 else 1 / 6) / (1.0 if adaptive else math.sqrt(m))
        scale = scales.get(matrix.layer, torch.ones((), device=weight.device)).to(weight.dtype)
        values = []
        for _ in range(probes):
            step = matrix.back(random_direction(weight * scale, adaptive, rng) / divisor(scale))
            total = -30.0 * base
            for k, factor in _STENCIL:
                moved = run(matrix.parameter, matrix.parameter + k * h * step)
                total = total + factor * moved.double().sum()
            values.append(total / (12 * h * h))
        method = f"finite_difference(hessian, {probes})"
        found[matrix.layer] = Contributions(torch.stack(values)[:, None], None, method, False)
    return found


def noise(
    x: Tensor, radius: float, rng: Rng, *, adaptive: bool, normalize: bool, kind: Kind, module: nn.Module
) -> Tensor:
    """A random change of a layer's input: ``radius ||phi||`` times a unit vector uniform on the sphere.

    With several positions in a sample (tokens, pixels) the noise is independent at each, with the root mean
    square of the sample's ``||phi||`` as scale. If adaptive, ``radius * phi * eps`` with eps standard normal:
    Gaussian dropout of variance ``radius^2``. If normalised, the same for features divided by their standard
    deviation over the batch, without those (for convolutions: channels) that do not vary in it.

    Raises:
        ConfigError: if the input is not made of real numbers.
    """
    if not x.is_floating_point():
        raise ConfigError(
            f"radius= moves the input of {type(module).__name__}, and that is {x.dtype}; name the next layer"
        )
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    last = wide if kind.outputs_last(module, wide).shape == wide.shape else kind.outputs_last(module, wide)
    eps = rng.normal(last)
    rows = last.reshape(last.shape[0] if last.ndim > 1 else 1, -1, last.shape[-1])
    flat = rows.detach().flatten(0, 1)
    scale = std_of_rows(flat, type(module).__name__) if normalize else flat.new_ones(())
    if adaptive:
        change = radius * last * eps * (scale > 0)
        return change if last is wide else kind.outputs_back(module, change).reshape(wide.shape)
    size = torch.linalg.vector_norm(rows / divisor(scale), dim=(1, 2)) / math.sqrt(rows.shape[1])
    eps = eps * (scale > 0)
    length = torch.linalg.vector_norm(eps, dim=-1, keepdim=True)
    unit = eps / length.clamp_min(torch.finfo(eps.dtype).tiny)  # a draw of exactly 0 stays 0
    size = size.reshape(-1, *[1] * (last.ndim - 1)) if last.ndim > 1 else size
    change = radius * size * scale * unit
    return change if last is wide else kind.outputs_back(module, change).reshape(wide.shape)


def shifted_outputs(call: Call, outputs: Tensor, change: Float[Tensor, "... m"]) -> Tensor | None:
    """The outputs with ``phi + change`` for phi, if they are a view of a dense layer's output; else None."""
    if not isinstance(call.module, nn.Linear):
        return None
    moved = (change @ call.weight.to(change.dtype).mT).to(outputs.dtype)
    if same_values(call, outputs, call.output):
        return outputs + moved.reshape(outputs.shape)
    z = call.output
    same_start = call.untouched() and z.is_contiguous() and z.data_ptr() == outputs.data_ptr()
    if same_start and z.numel() == outputs.numel():
        return outputs + moved.contiguous().as_strided(outputs.shape, outputs.stride())
    return None
