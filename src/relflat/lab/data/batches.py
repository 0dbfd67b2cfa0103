"""Batches of samples held in memory; the order of an epoch follows from the seed and its number alone."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from relflat.lab.data.arrays import Arrays, Inputs
from relflat.lab.data.augment import Augment, draws_for

Batch = tuple[Inputs, Tensor]


class InMemory(Dataset[Batch]):
    """Samples that are fetched a whole batch at a time, changed at random where the task says so."""

    def __init__(self, samples: Arrays, order: "EpochOrder", augment: Augment | None) -> None:
        self.samples, self.order, self.augment = samples, order, augment
        self._epoch, self._draws = -1, torch.empty(0)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, index: list[int]) -> Batch:
        """The hook that torch's loader looks for: all samples of a batch at once."""
        positions = torch.as_tensor(index)
        part = self.samples.take(positions)
        if self.augment is None:
            return part.inputs, part.targets
        if self._epoch != self.order.epoch:
            self._epoch = self.order.epoch
            self._draws = draws_for(len(self.samples), self.order.seed, self._epoch)
        assert isinstance(part.inputs, Tensor), "augmentation is for pictures"
        return self.augment(part.inputs, self._draws[positions]), part.targets


class EpochOrder(Sampler[list[int]]):
    """A fresh permutation each epoch, cut into equal batches; the ragged rest is left out that epoch."""

    epoch = 0  # set it before iterating
    drop_last = True  # Accelerate reads it

    def __init__(self, samples: int, batch_size: int, seed: int) -> None:
        self.samples, self.batch_size, self.seed = samples, min(batch_size, samples), seed

    def __len__(self) -> int:
        return self.samples // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(self.samples, generator=generator).tolist()
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield order[start : start + self.batch_size]


def training_loader(samples: Arrays, order: EpochOrder, augment: Augment | None = None) -> DataLoader[Batch]:
    """A loader over ``samples`` in the given order, drawing nothing from the global generator."""
    data, generator = InMemory(samples, order, augment), torch.Generator()
    return DataLoader(data, batch_sampler=order, collate_fn=lambda batch: batch, generator=generator)


def in_order(samples: Arrays, device: torch.device, size: int = 1000) -> Iterator[Batch]:
    """All samples in their order, for evaluating."""
    for start in range(0, len(samples), size):
        part = samples.take(slice(start, start + size)).to(device)
        yield part.inputs, part.targets
