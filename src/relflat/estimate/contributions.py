"""What an estimate gives: shares of kappa, by probe and group."""

import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from relflat.errors import LossError

Values = Float[Tensor, "k g"]


@dataclass(frozen=True, eq=False)
class Contributions:
    """Shares of kappa and of ``Tr H``: a number for each probe and group of samples, to be summed over groups.

    The mean over probes is kappa, exactly or in expectation. Groups draw independent directions, so one product
    serves as many probes as there are samples.

    Attributes:
        kappa: shares of kappa.
        trace: likewise for ``Tr H``, or None if it was not asked for.
        method: what was done, in words.
        exact: whether a single row holds the exact value.
        variances: of each group's mean over probes, of kappa and of ``Tr H``, where it is known from more than the
            spread of the shares.
        bias: what the mean over any number of probes may be off by (rounding and truncation of differences).
        lost: whether the gradient of kappa is not finite.
    """

    kappa: Values
    trace: Values | None
    method: str
    exact: bool
    variances: tuple[Float[Tensor, " g"] | None, Float[Tensor, " g"] | None] = (None, None)
    bias: float = 0.0
    lost: bool = False


def shaped(kappas: Mapping[str, Values], task: Tensor, scale: float = 1.0) -> Tensor:
    """Mean over probes, summed over layers to the shape of the task loss: all of it, or each sample's share; scaled.

    Raises:
        LossError: if there is not one share for each of the losses.
    """
    shares = []
    for layer, values in kappas.items():
        share = values.mean(0) if len(values) > 1 else values
        share = share if scale == 1 else scale * share
        if task.ndim > 0 and share.numel() != task.numel():
            raise LossError(
                f"the criterion returns losses of shape {tuple(task.shape)} and kappa of layer {layer!r} has "
                f"{share.numel()} shares (samples coupled, or not one loss a row); use a criterion that reduces"
            )
        shares.append(share.sum() if task.ndim == 0 else share.reshape(task.shape))
    return functools.reduce(operator.add, shares) if shares else torch.zeros_like(task.detach())
