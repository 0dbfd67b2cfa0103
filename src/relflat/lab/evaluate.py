"""Accuracy, loss and calibration of a network on one split, and the kappa of a layer."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from relflat import Flatness, relative_flatness
from relflat.lab.batches import in_order
from relflat.lab.data import Arrays

BINS = 15


def evaluate(model: nn.Module, loss: nn.Module, samples: Arrays, device: torch.device) -> dict[str, Any]:
    """Evaluate a classifier in eval mode; the mode is put back afterwards.

    Args:
        model: gives logits.
        loss: mean over samples.
        samples: the split.
        device: where the model is.

    Returns:
        ``accuracy``, ``loss``, ``ece`` (expected calibration error, 15 bins of equal width), and its
        ``bins``: (share of the samples, mean confidence, accuracy) of each bin that holds any.
    """
    was_training = model.training
    model.eval()
    table = torch.zeros(BINS, 3, dtype=torch.float64)
    total = 0.0
    with torch.no_grad():
        for inputs, targets in in_order(samples, device):
            logits = model(inputs)
            total += float(loss(logits, targets)) * len(targets)
            table += calibration(logits, targets)
    model.train(was_training)
    counts, confidence, right = table.unbind(1)
    return {
        "accuracy": float(right.sum()) / len(samples),
        "loss": total / len(samples),
        "ece": float((confidence - right).abs().sum()) / len(samples),
        "bins": [
            (float(n) / len(samples), float(c / n), float(r / n))
            for n, c, r in zip(counts, confidence, right, strict=True)
            if n > 0
        ],
    }


def calibration(logits: Float[Tensor, "n d"], targets: Tensor) -> Float[Tensor, "bins 3"]:
    """By bins of confidence: how many samples, the sum of their confidences, how many are right."""
    confidence, guess = logits.softmax(1).max(1)
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    columns = torch.stack([torch.ones_like(confidence), confidence, (guess == targets).float()], 1)
    table = torch.zeros(BINS, 3, dtype=torch.float64)
    return table.index_add_(0, place.cpu(), columns.double().cpu())


def flatness(
    model: nn.Module, loss: nn.Module, samples: Arrays, device: torch.device, layer: str
) -> Flatness:
    """Relative flatness of one layer on the samples."""
    return relative_flatness(model, loss, list(in_order(samples, device)), layer=layer, device=device)
