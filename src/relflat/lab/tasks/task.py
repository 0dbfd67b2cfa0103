"""What a task is: what is learned, by which network, with which optimiser and budget."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn, optim
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, MultiStepLR

from relflat.lab.data.augment import Augment
from relflat.lab.data.splits import Splits
from relflat.lab.tasks.metrics import ACCURACY, Metric


class _Settings:
    """Settings of the class of torch.optim that is called the same."""

    def __call__(self, params: Iterable[Any]) -> optim.Optimizer:
        """Build the optimiser."""
        return getattr(optim, type(self).__name__)(params, **vars(self))


@dataclass(frozen=True)
class SGD(_Settings):
    """Settings of stochastic gradient descent; called with parameters, it builds the optimiser."""

    lr: float
    weight_decay: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False


@dataclass(frozen=True)
class Adam(_Settings):
    """Settings of Adam, weight decay as an L2 penalty; called with parameters, it builds the optimiser."""

    lr: float
    weight_decay: float = 0.0


@dataclass(frozen=True)
class AdamW(_Settings):
    """Settings of AdamW; called with parameters, it builds the optimiser."""

    lr: float
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)


def constant(optimizer: optim.Optimizer, steps: int) -> LRScheduler:
    """Learning rate as it is."""
    return LambdaLR(optimizer, lambda step: 1.0)


def staircase(optimizer: optim.Optimizer, steps: int) -> LRScheduler:
    """Learning rate times 0.2 after .3, .6 and .8 of all steps (Zagoruyko and Komodakis 2016; the FAM paper)."""
    return MultiStepLR(optimizer, [round(share * steps) for share in (0.3, 0.6, 0.8)], gamma=0.2)


def linear(optimizer: optim.Optimizer, steps: int) -> LRScheduler:
    """Learning rate rises over a tenth of the steps and falls linearly to zero, as is usual for fine-tuning."""
    rise = max(1, steps // 10)
    return LambdaLR(optimizer, lambda step: min((step + 1) / rise, max(0.0, (steps - step) / max(1, steps - rise))))


def cosine(optimizer: optim.Optimizer, steps: int) -> LRScheduler:
    """Learning rate falls to zero along half a cosine over all steps."""
    return CosineAnnealingLR(optimizer, T_max=steps)


class SplitFunction(Protocol):
    """Cuts the task's data into the splits of a run with this seed."""

    def __call__(self, *, train_size: int | None, label_noise: float, seed: int) -> Splits:
        """Return the splits."""


@dataclass(frozen=True)
class Task:
    """Everything about a learning problem except the algorithm (docs/study/own-task.md has a table of the fields).

    Raise ``version`` when the same configuration gives other numbers than before (another network, augmentation, cut
    of the data, or something that a task's own file imports); runs of another version are not reused.
    """

    name: str
    summary: str
    splits: SplitFunction
    model: Callable[[], nn.Module]
    loss: Callable[[], nn.Module]  # builds the criterion, mean over samples
    layer: str  # the layer whose kappa is followed during training, and the default one to regularise
    optimizer: SGD | Adam | AdamW
    schedule: Callable[[optim.Optimizer, int], LRScheduler]  # learning rate, of the number of all steps
    epochs: int
    batch_size: int
    metric: Metric = ACCURACY
    augment: Augment | None = None
    evaluation_size: int = 1000  # samples at a time when evaluating
    monitored: int = 1000  # samples of a split that metrics and kappa of an epoch are taken on
    version: int = 1
