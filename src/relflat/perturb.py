"""Perturbed forward passes: finite differences of the loss, and the finite-radius penalty.

Both look at the loss where the features of a layer are ``phi + noise`` and need no second derivative, so they
work with any operation and under any precision.
"""

import functools
import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from relflat.layers import rows
from relflat.probes import Contributions
from relflat.record import Call, same_values
from relflat.rng import rademacher
from relflat.site import safe_std

Inject = Callable[[str, Tensor], Tensor]
Run = Callable[[Inject], Tensor]

_STENCIL = ((-2, -1.0), (-1, 16.0), (1, 16.0), (2, -1.0))


def finite_difference(
    run: Run,
    loss: Tensor,
    calls: list[Call],
    *,
    probes: int,
    adaptive: bool,
    scales: dict[str, Tensor],
    rng: torch.Generator,
) -> dict[str, Contributions]:
    """Relative flatness by I4 with the second derivative along ``W R`` from a five-point stencil in the loss.

    ``R = a b'`` (diagonal if adaptive), one for the whole batch, so coupled samples are right too. Each probe
    and layer costs four forward passes. Truncation error O(h^4), rounding error about ``eps m / h^2`` times the
    loss (h the step: 1e-4 of the features in float64, 7e-2 in float32); neither is part of the standard error.
    Where a kink (ReLU) lies within a step its slope change counts as curvature: prefer float64 there.

    Args:
        run: the loss of one more forward pass with the given change to the layers' inputs.
        loss: the loss without change.
        calls: the recorded calls.
        probes: directions for each layer.
        adaptive: whether R is diagonal.
        scales: per-layer feature scales of ``normalize_features``, or empty.
        rng: source of the directions.
    """
    found: dict[str, Contributions] = {}
    base = loss.double()
    for layer in dict.fromkeys(c.layer for c in calls):
        phi = next(c.phi for c in calls if c.layer == layer)
        m = phi.shape[-1]
        wide = torch.zeros((), dtype=torch.promote_types(phi.dtype, torch.float32), device=phi.device)
        eps = torch.finfo(phi.dtype).eps
        h = eps ** (1 / 4 if phi.dtype == torch.float64 else 1 / 6) / (1.0 if adaptive else math.sqrt(m))
        scale = scales.get(layer, torch.ones_like(wide)).to(wide)
        values = []
        for _ in range(probes):
            a, b = rademacher((m,), wide, rng), rademacher((m,), wide, rng)

            def shift(x: Tensor, size: float, a: Tensor = a, b: Tensor = b, scale: Tensor = scale) -> Tensor:
                xs = x.to(scale.dtype) / scale
                along = a * xs if adaptive else a * (xs @ b)[..., None]
                return (x.to(scale.dtype) + size * scale * along).to(x.dtype)

            total = -30.0 * base.sum()
            for k, weight in _STENCIL:
                moved = run(functools.partial(_only, layer, functools.partial(shift, size=k * h)))
                total = total + weight * moved.double().sum()
            values.append(total / (12 * h * h))
        stacked = torch.stack(values)[:, None]
        found[layer] = Contributions(stacked, None, f"finite_difference({probes})", False)
    return found


def _only(layer: str, change: Callable[[Tensor], Tensor], name: str, x: Tensor) -> Tensor:
    return change(x) if name == layer else x


def noise(
    phi: Float[Tensor, "... m"],
    radius: float,
    rng: torch.Generator,
    *,
    adaptive: bool,
    normalize: bool,
    module: torch.nn.Module,
) -> Float[Tensor, "... m"]:
    """A random change of the features: ``radius ||phi||`` times a unit vector uniform on the sphere.

    With several positions in a sample the noise is independent at each, with the root mean square of the
    sample's ``||phi||`` as scale. If adaptive, ``radius * phi * eps`` with eps standard normal: Gaussian
    dropout of variance ``radius^2``.
    """
    wide = phi.to(torch.promote_types(phi.dtype, torch.float32))
    eps = torch.randn(wide.shape, generator=rng, device=phi.device, dtype=wide.dtype)
    if adaptive:
        return radius * wide * eps
    grouped = rows(module, wide)
    scale = torch.ones_like(wide[..., :1])
    if normalize:
        scale = safe_std(grouped.detach().flatten(0, 1).var(0, correction=0))
        grouped = grouped / scale
    size = torch.linalg.vector_norm(grouped, dim=(1, 2)) / math.sqrt(grouped.shape[1])
    unit = eps / torch.linalg.vector_norm(eps, dim=-1, keepdim=True)
    size = size.reshape(-1, *[1] * (wide.ndim - 1)) if wide.ndim > 1 else size
    return radius * size * scale * unit


def shifted_outputs(
    call: Call, outputs: Tensor, change: Float[Tensor, "... m"]
) -> Float[Tensor, "..."] | None:
    """The outputs with ``phi + change`` in place of phi, if they are a view of this layer's output; else None."""
    moved = (change @ call.weight.to(change.dtype).mT).to(outputs.dtype)
    if same_values(call, outputs):
        return outputs + moved.reshape(outputs.shape)
    z = call.output
    if (
        call.untouched()
        and z.is_contiguous()
        and z.data_ptr() == outputs.data_ptr()
        and z.shape.numel() == outputs.numel()
    ):
        return outputs + moved.contiguous().as_strided(outputs.shape, outputs.stride())
    return None
