"""Measuring the relative flatness of a trained run, on its own data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from relflat import Flatness, relative_flatness
from relflat.lab import checkpoint
from relflat.lab.batches import in_order
from relflat.lab.data import Arrays
from relflat.lab.names import look_up
from relflat.lab.splits import Splits
from relflat.lab.store import config_of
from relflat.lab.tasks import TASKS

Split = Literal["train", "validation", "test"]

SPLITS: dict[str, Callable[[Splits], Arrays]] = {
    "train": lambda splits: splits.train,
    "validation": lambda splits: splits.validation,
    "test": lambda splits: splits.test(),
}


def measure_run(run: Path, *, layer: str | None = None, split: str = "train", **options: Any) -> Flatness:
    """Rebuild a run's data and network from its folder and measure one layer.

    Args:
        run: the run's folder.
        layer: the layer's name; by default the one its task follows.
        split: which samples, with the labels the run saw.
        **options: further arguments of `relflat.relative_flatness`.

    Raises:
        DataError: the folder holds no run, no checkpoint, or the data set was not fetched.
        ConfigError: no such split.
        LayerError: no such layer.
    """
    config = config_of(run)
    choose = look_up("split", split, SPLITS)
    task = TASKS[config.task]
    model = task.model()
    checkpoint.load_weights(run, model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    samples = choose(
        task.splits(train_size=config.train_size, label_noise=config.label_noise, seed=config.seed)
    )
    batches = list(in_order(samples, device))
    return relative_flatness(
        model.to(device), task.loss(), batches, layer=layer or task.layer, device=device, **options
    )
