"""Tasks: what is learned, by which network, with which optimiser and budget.

A task is a frozen record. A new one is one more entry in ``TASKS``; nothing else needs to know it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import nn, optim
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from relflat.lab import own
from relflat.lab.models import mlp, resnet20, small_cnn
from relflat.lab.names import look_up
from relflat.lab.splits import Splits, classification


@dataclass(frozen=True)
class SGD:
    """Settings of stochastic gradient descent; called with parameters, it builds the optimiser."""

    lr: float
    weight_decay: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False

    def __call__(self, params: Iterable[Any]) -> optim.Optimizer:
        """Build the optimiser."""
        return optim.SGD(
            params,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
        )


@dataclass(frozen=True)
class AdamW:
    """Settings of AdamW; called with parameters, it builds the optimiser."""

    lr: float
    weight_decay: float = 0.01

    def __call__(self, params: Iterable[Any]) -> optim.Optimizer:
        """Build the optimiser."""
        return optim.AdamW(params, lr=self.lr, weight_decay=self.weight_decay)


def cosine(optimizer: optim.Optimizer, steps: int) -> LRScheduler:
    """Learning rate falls to zero along half a cosine over all steps."""
    return CosineAnnealingLR(optimizer, T_max=steps)


class SplitFunction(Protocol):
    """Cuts the task's data into splits."""

    def __call__(self, *, train_size: int | None, label_noise: float, seed: int) -> Splits:
        """Return the splits of a run with this seed."""
        ...


@dataclass(frozen=True)
class Task:
    """Everything about a learning problem except the method.

    Attributes:
        name: the name on the command line.
        summary: one line for lists.
        splits: makes the training, validation and test splits.
        model: builds the untrained network.
        loss: builds the criterion, mean over samples.
        layer: the layer whose kappa is followed during training, and the default one to regularise.
        optimizer: the base optimiser's settings.
        schedule: learning rate over the steps.
        epochs: passes over the training data.
        batch_size: samples a step.
    """

    name: str
    summary: str
    splits: SplitFunction
    model: Callable[[], nn.Module]
    loss: Callable[[], nn.Module]
    layer: str
    optimizer: SGD | AdamW
    schedule: Callable[[optim.Optimizer, int], LRScheduler]
    epochs: int
    batch_size: int


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="digits",
            summary="8x8 digits, MLP 64-128-128-10; 897 train, 400 validation, 500 test",
            splits=partial(classification, "digits", validation=400, test=500),
            model=partial(mlp, 64),
            loss=nn.CrossEntropyLoss,
            layer="output",
            optimizer=SGD(lr=0.05, weight_decay=5e-4),
            schedule=cosine,
            epochs=40,
            batch_size=32,
        ),
        Task(
            name="fashion-mnist",
            summary="28x28 clothes, small CNN; 55,000 train, 5,000 validation, the official 10,000 test",
            splits=partial(classification, "fashion-mnist", validation=5000, test=None),
            model=partial(small_cnn, in_channels=1),
            loss=nn.CrossEntropyLoss,
            layer="output",
            optimizer=SGD(lr=0.05, weight_decay=5e-4),
            schedule=cosine,
            epochs=25,
            batch_size=64,
        ),
        Task(
            name="cifar10",
            summary="32x32 pictures, small CNN; 45,000 train, 5,000 validation, the official 10,000 test",
            splits=partial(classification, "cifar10", validation=5000, test=None),
            model=partial(small_cnn, in_channels=3),
            loss=nn.CrossEntropyLoss,
            layer="output",
            optimizer=SGD(lr=0.05, weight_decay=5e-4),
            schedule=cosine,
            epochs=25,
            batch_size=64,
        ),
        Task(
            name="cifar10-resnet20",
            summary="32x32 pictures, ResNet-20; 45,000 train, 5,000 validation, the official 10,000 test",
            splits=partial(classification, "cifar10", validation=5000, test=None),
            model=resnet20,
            loss=nn.CrossEntropyLoss,
            layer="output",
            optimizer=SGD(lr=0.1, weight_decay=5e-4),
            schedule=cosine,
            epochs=15,
            batch_size=128,
        ),
    )
}


def task_named(name: str) -> Task:
    """The task of this name, or the one that ``path/to/file.py:name`` defines.

    Raises:
        ConfigError: there is none.
    """
    place = own.split_name(name)
    task: Task = look_up("task", name, TASKS) if place is None else own.load(*place, Task)
    return task


def full_name(name: str) -> str:
    """The name of a task with the whole path of its file, if it has one."""
    place = own.split_name(name)
    return name if place is None else f"{place[0]}:{place[1]}"


def short_name(name: str) -> str:
    """The name of a task for titles and folders."""
    place = own.split_name(name)
    return name if place is None else f"{place[0].stem}-{place[1]}"


def source_of(name: str) -> str | None:
    """What stands for the content of the task's file; None for a built-in task."""
    place = own.split_name(name)
    return None if place is None else own.fingerprint(place[0])
