"""How the losses of batches make up the loss of all the data: as a mean, by a divisor of its own, or as a sum."""

from typing import Any

import torch
from torch import Tensor

from relflat.errors import LossError
from relflat.estimate.scene import Scene
from relflat.measure.batches import join, length

Weight = tuple[float, float]
"""What a batch's loss is multiplied by to be added up, and what it adds to the divisor (0: there is none)."""


def weight_of_known(scene: Scene) -> Weight:
    """A mean is turned back into a sum, and divided at the end: by samples, class weights or tokens not ignored."""
    assert scene.known is not None
    if scene.known.reduction == "sum":
        return (1.0, 0.0) if scene.loss.ndim == 0 else (1.0, float(scene.loss.numel()))
    divisor = float(scene.known.divisor())
    return (divisor, divisor) if scene.known.reduction == "mean" else (1.0, divisor)


def weight_of_unknown(scene: Scene, kind: str) -> Weight:
    """A loss without reduction counts its rows; else ``kind`` says what it is: ``"mean"``, ``"sum"``, ``"only"``."""
    if scene.loss.ndim > 0:
        return 1.0, float(scene.loss.numel())
    n = float(length(_outputs(scene))) if kind == "mean" else 1.0
    return (n, n) if kind == "mean" else (1.0, 0.0)


def is_mean(scene: Scene) -> bool:
    """Whether the loss of a batch is a mean; an unknown one is tried on the batch given twice."""
    if scene.known is not None:
        return scene.known.reduction == "mean"
    if scene.loss.ndim > 0:
        return False
    twice = _joint_loss(scene, _outputs(scene), _targets(scene))
    once = float(scene.loss.detach())
    return abs(twice - once) <= abs(twice - 2 * once)


def kind_of_unknown(scene: Scene, other: Scene) -> str:
    """``"mean"`` or ``"sum"`` over samples: which of the two the loss of both batches is of those of each.

    Raises:
        LossError: neither.
    """
    both = _joint_loss(scene, _outputs(other), _targets(other))
    one, two = float(scene.loss.detach()), float(other.loss.detach())
    n, m = length(_outputs(scene)), length(_outputs(other))
    close = (1e-9 if scene.loss.dtype == torch.float64 else 1e-4) * (abs(one) + abs(two) + abs(both) + 1e-30)
    if abs((n * one + m * two) / (n + m) - both) < close:
        return "mean"
    if abs(one + two - both) < close:
        return "sum"
    raise LossError(
        "this loss over two batches is neither the mean nor the sum over their samples, so kappa of all the data "
        "cannot be put together from batches; give all data as one batch, or use a known loss"
    )


def _joint_loss(scene: Scene, outputs: Any, targets: Any) -> float:
    """The loss of a batch and other outputs and targets together."""
    assert scene.replay is not None
    loss_fn = scene.replay.criterion.loss_fn
    with torch.no_grad():
        loss: Tensor = loss_fn(join(_outputs(scene), outputs), join(_targets(scene), targets))
    return float(loss)


def _outputs(scene: Scene) -> Any:
    assert scene.replay is not None
    return scene.replay.outputs


def _targets(scene: Scene) -> Any:
    assert scene.replay is not None
    return scene.replay.criterion.targets[0]
