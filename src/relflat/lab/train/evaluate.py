"""What a network is judged by on one split (`relflat.lab.tasks.metrics`), and the kappa of a layer."""

from collections.abc import Iterable

from torch import nn

from relflat import Flatness, relative_flatness
from relflat.lab.data.batches import Batch
from relflat.lab.tasks.metrics import ACCURACY, Metric, evaluate, run

__all__ = ["ACCURACY", "Metric", "evaluate", "flatness", "run"]


def flatness(model: nn.Module, loss: nn.Module, batches: Iterable[Batch], layer: str) -> Flatness:
    """Relative flatness of one layer on the samples."""
    return relative_flatness(model, loss, list(batches), layer=layer)
