"""Published architectures, each in a small configuration with random weights: how one is written down."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = tuple[tuple[Any, ...], dict[str, Any], Tensor]
View = Callable[[Tensor], Tensor]

cross_entropy, squared_error = nn.CrossEntropyLoss(), nn.MSELoss()


def stack(w: Tensor) -> Tensor:
    """Matrices (k, d, m), such as those of experts."""
    return w


def stack_at_right(w: Tensor) -> Tensor:
    """Matrices (k, m, d), used as ``x @ P``."""
    return w.mT


def at_right(w: Tensor) -> Tensor:
    """A matrix (m, ...) used as ``x @ P``."""
    return w.flatten(1).mT[None]


@dataclass(frozen=True)
class Published:
    """One architecture of a library, run by the library's own forward.

    Attributes:
        name: the class, or the name by which the library creates it.
        library: the distribution it comes from.
        build: makes it.
        batch: makes positional arguments, keyword arguments and targets.
        output: qualified name of the layer that makes what the loss is computed from.
        hidden: name of one hidden layer, module or parameter.
        loss: of the outputs and the targets.
        outputs: takes them from what the model returns; for cross-entropy with the classes last.
        besides: names (patterns) of parameters of two or more dimensions that are no weight matrix: they are
            added, or multiplied entry by entry.
        views: for names (patterns) of parameters how the forward uses them, as matrices (k, d, m) that act on
            columns, where that is not ``flatten(1)`` and the class of their module does not tell.
        unsure: whether something is done to what the output layer gives, so that an error that names it is right too.
    """

    name: str
    library: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    output: str
    hidden: str
    loss: nn.Module
    outputs: Callable[[Any], Tensor]
    besides: tuple[str, ...] = ()
    views: tuple[tuple[str, View], ...] = ()
    unsure: bool = False

    def model(self) -> nn.Module:
        """The model in float64 and evaluation mode, without dropout, with every entry of its parameters moved."""
        torch.manual_seed(1)
        model = self.build().double()
        with torch.no_grad():
            for p in model.parameters():  # many start at 0 or 1, where a wrong factor would not show
                size = 0.05 if p.ndim < 2 else min(0.1, 0.3 / p[0].numel() ** 0.5)
                p.add_(torch.randn_like(p), alpha=size)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model.eval()

    def run(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Outputs and targets of a batch: ``forward=`` of a measurement."""
        args, kwargs, y = batch
        z = self.outputs(model(*args, **kwargs))
        return (z.flatten(0, -2), y.flatten()) if self.loss is cross_entropy else (z, y)

    @property
    def data(self) -> Batch:
        """The batch, always the same, in float64."""
        torch.manual_seed(2)
        return self.batch()


def logits(returned: Any) -> Tensor:
    """What classifiers and language models of transformers give to their loss."""
    return returned.logits


def picture(n: int = 2, channels: int = 3, size: int = 8) -> Tensor:
    return torch.randn(n, channels, size, size, dtype=torch.float64)


def labels(*shape: int, classes: int = 3) -> Tensor:
    return torch.randint(classes, shape)
