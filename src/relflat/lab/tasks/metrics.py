"""What a network is judged by on one split."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from relflat.lab.data.arrays import Inputs
from relflat.lab.data.batches import Batch
from relflat.measure.undisturbed import evaluating

BINS = 15
Evaluate = Callable[[nn.Module, nn.Module, Iterable[Batch]], dict[str, Any]]


@dataclass(frozen=True)
class Metric:
    """What a task is judged by: a number of at most 1, where higher is better.

    ``evaluate``, given the model in eval mode, the loss and the batches of a split, returns ``name``, ``loss`` and
    whatever else is worth keeping; it runs without gradients.
    """

    name: str  # its key in the results
    title: str  # as it is written in reports
    error: str  # what one minus it is called in reports
    evaluate: Evaluate


def run(model: nn.Module, inputs: Inputs) -> Any:
    """The model's outputs; inputs by name are given as keyword arguments."""
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def evaluate(metric: Metric, model: nn.Module, loss: nn.Module, batches: Iterable[Batch]) -> dict[str, Any]:
    """What the metric says of the batches of a split, in eval mode; every module's mode is put back afterwards."""
    with evaluating(model), torch.no_grad():
        return metric.evaluate(model, loss, batches)


def classify(model: nn.Module, loss: nn.Module, batches: Iterable[Batch]) -> dict[str, Any]:
    """A classifier's ``accuracy``, ``loss``, ``ece`` (expected calibration error, 15 equally wide bins) and ``bins``.

    ``bins`` has (share of the samples, mean confidence, accuracy) of each bin that holds any.
    """
    table = torch.zeros(BINS, 3, dtype=torch.float64)
    total = 0.0
    for inputs, targets in batches:
        logits = run(model, inputs)
        total += float(loss(logits, targets)) * len(targets)
        table += calibration(logits, targets)
    counts, confidence, right = table.unbind(1)
    samples = float(counts.sum())
    return {
        "accuracy": float(right.sum()) / samples,
        "loss": total / samples,
        "ece": float((confidence - right).abs().sum()) / samples,
        "bins": [(n / samples, c / n, r / n) for n, c, r in table.tolist() if n > 0],
    }


def calibration(logits: Float[Tensor, "n d"], targets: Tensor) -> Float[Tensor, "bins 3"]:
    """By bins of confidence: how many samples, the sum of their confidences, how many are right."""
    confidence, guess = logits.nan_to_num().softmax(1).max(1)  # the loss says that some are not numbers
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    columns = torch.stack([torch.ones_like(confidence), confidence, (guess == targets).float()], 1)
    table = torch.zeros(BINS, 3, dtype=torch.float64)
    return table.index_add_(0, place.cpu(), columns.double().cpu())


ACCURACY = Metric("accuracy", "accuracy", "error", classify)
