"""Disjoint training, validation and test splits, fewer training samples, and label noise.

The cut between the three splits is a property of the task and the same for every run. What the run's
seed draws is the training subset (``train_size``) and the label noise; so runs of the same seed see
the same training data whatever their algorithm.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from relflat.errors import ConfigError
from relflat.lab.data.arrays import Arrays, RawData
from relflat.lab.data.fetch import read

SPLIT_SEED = 20261124  # of the cut itself; the seed of a run never moves a sample between splits


@dataclass(frozen=True)
class Splits:
    """The three splits of a task, ready for the network; only labels of the training split may be noisy.

    ``test`` and ``shifts`` (further test sets, from elsewhere) are functions, so that nothing touches them early.
    """

    train: Arrays
    validation: Arrays
    test: Callable[[], Arrays]
    changed: float = 0.0  # share of the training labels that noise really changed
    shifts: Mapping[str, Callable[[], Arrays]] = field(default_factory=dict)


def classification(
    data: str | Callable[[], RawData],
    *,
    validation: int,
    test: int | None,
    train_size: int | None,
    label_noise: float,
    seed: int,
    standardise: bool = True,
) -> Splits:
    """Cut a data set of a classification task into its splits.

    Args:
        data: name of the data set, or a function that reads it.
        validation: number of validation samples, drawn from the pool.
        test: number of test samples drawn from the pool, or None to use the official test set.
        train_size: how many of the remaining samples to train on; None for all.
        label_noise: probability with which each training label is redrawn uniformly over all classes.
        seed: of the subset and the noise.
        standardise: give each channel zero mean and unit deviation over the training samples.
    """
    if not 0 <= label_noise <= 1:
        raise ConfigError(f"label_noise={label_noise} is not a probability; give a number from 0 to 1.")
    raw = read(data) if isinstance(data, str) else data()
    order = torch.randperm(len(raw.pool), generator=torch.Generator().manual_seed(SPLIT_SEED))
    validation_index, test_index, rest = order.tensor_split([validation, validation + (test or 0)])
    if len(rest) < 2:
        raise ConfigError(
            f"{len(raw.pool)} samples are too few for {validation} validation and {test or 0} test samples and "
            "at least 2 to train on; make those splits smaller."
        )
    generator = torch.Generator().manual_seed(seed)
    train = raw.pool.take(subset(rest, train_size, generator))
    noisy = redraw(train, label_noise, raw.classes, generator)
    scale = standardiser(train) if standardise else lambda samples: samples

    def test_split() -> Arrays:
        if test is not None:
            return scale(raw.pool.take(test_index))
        assert raw.test is not None, "a task without an official test set must cut one from the pool"
        return scale(raw.test)

    return Splits(
        train=scale(noisy),
        validation=scale(raw.pool.take(validation_index)),
        test=test_split,
        changed=(noisy.targets != train.targets).double().mean().item(),
        shifts={name: partial(scale, samples) for name, samples in raw.shifts.items()},
    )


def subset(index: Tensor, size: int | None, generator: torch.Generator) -> Tensor:
    """Draw ``size`` of the positions, or keep all in their order."""
    if size is None:
        return index
    if not 1 < size <= len(index):
        raise ConfigError(f"train_size={size} is not between 2 and {len(index)}, the training samples there are.")
    return index[torch.randperm(len(index), generator=generator)[:size]]


def redraw(samples: Arrays, probability: float, classes: int, generator: torch.Generator) -> Arrays:
    """Redraw each label uniformly with a probability; a redrawn label may come out as it was."""
    if probability == 0:
        return samples
    if samples.targets.is_floating_point():
        raise ConfigError(
            f"label_noise={probability} redraws class labels, and this task's targets are {samples.targets.dtype}; "
            "leave it out"
        )
    chosen = torch.rand(len(samples), generator=generator) < probability
    drawn = torch.randint(classes, (len(samples),), generator=generator)
    return Arrays(samples.inputs, torch.where(chosen, drawn, samples.targets))


def standardiser(train: Arrays) -> Callable[[Arrays], Arrays]:
    """Zero mean and unit deviation of each channel, taken from the training samples."""
    assert isinstance(train.inputs, Tensor), "inputs by name cannot be standardised: standardise=False"
    axes = (0, *range(2, train.inputs.dim()))
    mean = train.inputs.mean(axes, keepdim=True)
    deviation = train.inputs.std(axes, keepdim=True).clamp_min(1e-8)

    def scale(samples: Arrays) -> Arrays:
        assert isinstance(samples.inputs, Tensor)
        return Arrays((samples.inputs - mean) / deviation, samples.targets)

    return scale
