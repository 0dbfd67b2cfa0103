"""Samples held in memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Inputs = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class Arrays:
    """Samples held in memory, first axis samples: what the network is given and what it should answer.

    ``inputs`` are one tensor, or the network's keyword arguments by name (token ids, mask); ``targets`` are class
    indices, or whatever else the task's loss compares outputs with.
    """

    inputs: Inputs
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def pictures(self) -> bool:
        """Whether these are pictures (n, c, h, w) with a class index each, which stays right if one is changed."""
        whole = isinstance(self.inputs, Tensor) and self.inputs.dim() == 4
        return whole and self.targets.dim() == 1 and not self.targets.is_floating_point()

    def take(self, index: Tensor | slice) -> "Arrays":
        """The samples at these positions."""
        return self._each(lambda values: values[index])

    def to(self, device: torch.device) -> "Arrays":
        """The same samples on a device."""
        return self._each(lambda values: values.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Arrays":
        if isinstance(self.inputs, Tensor):
            return Arrays(change(self.inputs), change(self.targets))
        return Arrays({name: change(values) for name, values in self.inputs.items()}, change(self.targets))


@dataclass(frozen=True)
class RawData:
    """A data set of a classification task as it was published, pixels scaled to 0..1."""

    pool: Arrays  # what may be trained and validated on
    test: Arrays | None  # the official test set, where one was published
    classes: int
    shifts: Mapping[str, Arrays] = field(default_factory=dict)  # further test sets from elsewhere
