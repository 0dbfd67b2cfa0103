"""Accuracy and loss of a network on one split, and the kappa of a layer."""

import torch
from torch import nn

from relflat import Flatness, relative_flatness
from relflat.lab.batches import in_order
from relflat.lab.data import Arrays


def accuracy_and_loss(
    model: nn.Module, loss: nn.Module, samples: Arrays, device: torch.device
) -> dict[str, float]:
    """Evaluate a classifier in eval mode; the mode is put back afterwards.

    Args:
        model: gives logits.
        loss: mean over samples.
        samples: the split.
        device: where the model is.
    """
    was_training = model.training
    model.eval()
    right, total = 0, 0.0
    with torch.no_grad():
        for inputs, targets in in_order(samples, device):
            logits = model(inputs)
            right += int((logits.argmax(1) == targets).sum())
            total += float(loss(logits, targets)) * len(targets)
    model.train(was_training)
    return {"accuracy": right / len(samples), "loss": total / len(samples)}


def flatness(
    model: nn.Module, loss: nn.Module, samples: Arrays, device: torch.device, layer: str
) -> Flatness:
    """Relative flatness of one layer on the samples."""
    return relative_flatness(model, loss, list(in_order(samples, device)), layer=layer, device=device)
