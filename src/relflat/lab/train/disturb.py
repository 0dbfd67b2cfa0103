"""Baselines that disturb what layers are given while the network trains: dropout and plain noise."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from relflat.capture.resolve import resolve
from relflat.errors import ConfigError
from relflat.lab.common.names import names_in

Change = Callable[[Tensor], Tensor]


class Disturbed(nn.Module):
    """The task loss of a model whose layers are given changed inputs in training mode.

    Args:
        loss: the criterion.
        model: the network; ``close`` removes the hooks from it.
        layers: name or glob of the layers, several with commas.
        change: what is done to an input; draws from torch's global generator.
    """

    def __init__(self, loss: nn.Module, model: nn.Module, layers: str, change: Change) -> None:
        super().__init__()
        self.loss = loss

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            return (change(args[0]), *args[1:]) if module.training else None

        self._handles = []
        for name, layer in resolve(model, names_in(layers)).items():
            if not isinstance(layer, nn.Module):
                raise ConfigError(f"layer={layers!r}: {name!r} is a parameter, which has no input.")
            self._handles.append(layer.register_forward_pre_hook(before))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The task loss."""
        loss: Tensor = self.loss(outputs, targets)
        return loss

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def dropout(rate: float) -> Change:
    """Drop each entry with this probability and scale up the rest (Srivastava et al. 2014)."""
    if not 0 <= rate < 1:
        raise ConfigError(f"rate={rate} must lie between 0 and 1, 1 excluded.")
    return lambda x: nn.functional.dropout(x, rate, training=True)


def noise(sigma: float) -> Change:
    """Add independent Gaussian noise of this deviation (Camuto et al. 2020)."""
    if not sigma >= 0:
        raise ConfigError(f"sigma={sigma} must not be negative.")
    return lambda x: x + sigma * torch.randn_like(x)
