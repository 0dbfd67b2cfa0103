"""Deliberately awkward networks: how a test module writes one down."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

N, IN, CLASSES = 5, 4, 3
CE = nn.CrossEntropyLoss()
Loss = Callable[[Any, Tensor], Tensor]
Build = Callable[[], nn.Module]


class Net(nn.Module):
    """Some parts and a forward pass written as a function of them."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


@dataclass(frozen=True)
class Architecture:
    """One awkward network.

    Attributes:
        build: makes it (with the global seed set).
        layers: the layers and parameters whose kappa is asked for.
        call: ``(model, x) -> outputs``.
        x: makes the data.
        y: the targets.
        loss: ``(outputs, targets) -> scalar``.
        weight: the layer's weight, where that is not in the layer.
        dtype: what it is cast to.
        precision: relative error of its arithmetic; 0 for float64.
    """

    name: str
    build: Callable[[], nn.Module]
    layers: tuple[str, ...]
    call: Callable[[Any, Any], Any] = lambda model, x: model(x)
    x: Callable[[], Any] = lambda: torch.randn(N, IN)
    y: Callable[[], Any] = lambda: torch.tensor([0, 2, 1, 1, 0])
    loss: Loss = CE
    weight: Callable[[Any], Tensor] | None = None
    dtype: torch.dtype | None = torch.float64
    precision: float = 0.0


class Family:
    """Decorator that collects the architectures of one test module.

    Attributes:
        members: the architectures, in the order of the module.
    """

    def __init__(self) -> None:
        self.members: list[Architecture] = []

    def __call__(self, *layers: str, **options: Any) -> Callable[[Build], Build]:
        def enter(build: Build) -> Build:
            self.members.append(Architecture(build.__name__, build, layers, **options))
            return build

        return enter


def image(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(N, *shape)
