"""Batches of samples held in memory; the order of an epoch follows from the seed and its number alone."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from relflat.lab.data import Arrays

Batch = tuple[Tensor, Tensor]


class InMemory(Dataset[Batch]):
    """Samples that are fetched a whole batch at a time."""

    def __init__(self, samples: Arrays) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Batch:
        return self.samples.inputs[index], self.samples.targets[index]

    def __getitems__(self, index: list[int]) -> Batch:
        """The hook that torch's loader looks for: all samples of a batch at once."""
        positions = torch.as_tensor(index)
        return self.samples.inputs[positions], self.samples.targets[positions]


class EpochOrder(Sampler[list[int]]):
    """A fresh permutation each epoch, cut into equal batches; the ragged rest is left out that epoch.

    Attributes:
        epoch: set it before iterating.
        batch_size: samples a batch, never more than there are.
        drop_last: always True; Accelerate reads it.
    """

    def __init__(self, samples: int, batch_size: int, seed: int) -> None:
        self.samples = samples
        self.batch_size = min(batch_size, samples)
        self.seed = seed
        self.epoch = 0
        self.drop_last = True

    def __len__(self) -> int:
        return self.samples // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(self.samples, generator=generator).tolist()
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield order[start : start + self.batch_size]


def training_loader(samples: Arrays, order: EpochOrder) -> DataLoader[Batch]:
    """A loader over ``samples`` in the given order, drawing nothing from the global generator."""
    return DataLoader(
        InMemory(samples), batch_sampler=order, collate_fn=lambda batch: batch, generator=torch.Generator()
    )


def in_order(samples: Arrays, device: torch.device, size: int = 1000) -> Iterator[Batch]:
    """All samples in their order, for evaluating."""
    for start in range(0, len(samples), size):
        part = samples.take(slice(start, start + size))
        yield part.inputs.to(device), part.targets.to(device)
