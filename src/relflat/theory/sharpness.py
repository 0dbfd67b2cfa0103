"""How much the loss can rise within a ball around the weights: SAM's sharpness and its kin, by gradient ascent."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

Ball = Literal["sphere", "adaptive", "box"]
LossAndGradients = Callable[[], tuple[float, list[Tensor]]]
"""The loss over all of the data at the parameters as they are, and its gradient in each."""


def rise_within(
    ball: Ball, radius: float, parameters: Sequence[nn.Parameter], loss_and_gradients: LossAndGradients, steps: int
) -> float:
    """``max L(theta + e) - L(theta)`` over a ball, from below: projected ascent keeps the highest point it saw.

    ``"sphere"``: ``||e|| <= radius`` (Foret et al. 2021, eq. 1); their own step is the first one here, so this is at
    least what SAM sees. ``"adaptive"``: ``||e / |theta||| <= radius`` (Kwon et al. 2021, elementwise). ``"box"``:
    ``|e_i| <= radius (|theta_i| + 1)`` (Keskar et al. 2017, full space). The parameters are left as they were.
    """
    origin = [p.detach().clone() for p in parameters]
    scale = [{"sphere": torch.ones_like(o), "adaptive": o.abs(), "box": o.abs() + 1}[ball] for o in origin]
    shift = [torch.zeros_like(o) for o in origin]  # in units of the scale
    start, highest = math.nan, -math.inf
    with kept(parameters):
        for step in range(steps + 1):
            value, gradients = loss_and_gradients()
            start, highest = (value, highest) if step == 0 else (start, max(highest, value))
            if step == steps:
                break
            uphill = [g * s for g, s in zip(gradients, scale, strict=True)]
            shift = _moved(shift, uphill, radius, box=ball == "box")
            put(parameters, [o + e * s for o, e, s in zip(origin, shift, scale, strict=True)])
    return highest - start


def _moved(shift: list[Tensor], uphill: list[Tensor], radius: float, *, box: bool) -> list[Tensor]:
    """A step as long as the radius, and back into the ball."""
    if box:
        return [(e + radius * u.sign()).clamp(-radius, radius) for e, u in zip(shift, uphill, strict=True)]
    length = _norm(uphill) or 1.0
    shift = [e + radius * (u / length) for e, u in zip(shift, uphill, strict=True)]
    inwards = radius / max(radius, _norm(shift))
    return [e * inwards for e in shift]


def _norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


@torch.no_grad()
def put(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Give parameters or buffers these values."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


@contextmanager
def kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Put the values of parameters or buffers back at the end."""
    tensors = list(tensors)
    values = [t.detach().clone() for t in tensors]
    try:
        yield
    finally:
        put(tensors, values)
