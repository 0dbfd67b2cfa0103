"""A run's moving parts, built from its configuration alone, in one process or several that ``torchrun`` started."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from relflat import FAM
from relflat.errors import ConfigError
from relflat.lab.data.arrays import Arrays
from relflat.lab.data.augment import Augment, crop_flip, shift
from relflat.lab.data.batches import Batch, EpochOrder, in_order, training_loader
from relflat.lab.data.splits import Splits
from relflat.lab.tasks import Task, task_named
from relflat.lab.train.algorithms import Disturbed, Dropout, Smoothing
from relflat.lab.train.config import RunConfig
from relflat.lab.train.steps import Learner


def this_process() -> PartialState:
    """The number and the device of this process, its own GPU or the CPU; it joins those that ``torchrun`` started."""
    return PartialState(cpu=not torch.cuda.is_available())


@contextmanager
def joined() -> Iterator[PartialState]:
    """This process among those that ``torchrun`` started, which part at the end of the block."""
    others = torch.distributed.is_initialized()
    state = this_process()
    try:
        yield state
    finally:
        if not others:
            state.destroy_process_group()


@dataclass
class Session:
    """What a run works with: the bare task loss is for evaluating, order and loader are of the training data."""

    config: RunConfig
    task: Task
    splits: Splits
    learner: Learner
    loss: nn.Module
    scheduler: LRScheduler
    order: EpochOrder
    loader: Any
    dropout: nn.Module | None  # the recipe's, which is hooked into the model

    @property
    def accelerator(self) -> Accelerator:
        """What knows of the other processes."""
        return self.learner.accelerator

    @property
    def model(self) -> nn.Module:
        """The network without the wrappers that Accelerate may have put around it."""
        return self.accelerator.unwrap_model(self.learner.model)

    @property
    def writes(self) -> bool:
        """Whether this is the process that keeps the run's folder; always, where there is but one."""
        return bool(self.accelerator.is_main_process)

    @property
    def parts(self) -> dict[str, Any]:
        """What keeps a state of its own between epochs."""
        learner = self.learner
        parts = {"model": self.model, "criterion": learner.criterion, "optimizer": learner.optimizer}
        return {**parts, "scheduler": self.scheduler, "scaler": self.accelerator.scaler}

    def training(self) -> None:
        """Set model and criterion to training mode."""
        self.learner.model.train()
        self.learner.criterion.train()

    def batches(self, samples: Arrays) -> Iterator[Batch]:
        """Samples in their order on the run's device, for evaluating."""
        return in_order(samples, self.accelerator.device, self.task.evaluation_size)

    def mean(self, value: float) -> float:
        """The mean of a number over all processes."""
        if self.accelerator.num_processes == 1:
            return value
        here = torch.tensor(value, dtype=torch.float32, device=self.accelerator.device)
        return float(self.accelerator.reduce(here, "mean"))

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """The network as it is, in float32: Accelerate's forward pass, which casts, is put aside meanwhile."""
        casting = vars(self.model).pop("forward", None) if self.config.precision != "no" else None
        try:
            yield
        finally:
            if casting is not None:
                self.model.forward = casting

    def close(self) -> None:
        """Let go of what the criterion hooked into the model."""
        for each in (self.learner.criterion, self.dropout):
            if isinstance(each, FAM | Disturbed):
                each.close()


def build(config: RunConfig, logs: Path | None = None) -> Session:
    """Seed everything and build a run's data, network, criterion and optimiser; ``logs`` is TensorBoard's folder."""
    task, algorithm = task_named(config.task), config.settings
    splits = task.splits(train_size=config.train_size, label_noise=config.label_noise, seed=config.seed)
    set_seed(config.seed)
    accelerator = accelerator_for(config, logs)
    if config.batch_size % accelerator.num_processes:
        raise ConfigError(
            f"batch_size={config.batch_size} cannot be shared evenly by {accelerator.num_processes} processes; "
            f"give a multiple of {accelerator.num_processes}."
        )
    model, loss = a_module("model", task.model()), a_module("loss", task.loss())
    base = replace(task.optimizer, lr=config.lr, weight_decay=config.weight_decay)
    optimizer = algorithm.optimizer(model.parameters(), base)
    order = EpochOrder(len(splits.train), config.batch_size, config.seed)
    whose_lr = getattr(optimizer, "base_optimizer", optimizer)  # of SAM that of its inner one counts
    scheduler = task.schedule(whose_lr, config.epochs * len(order))
    loader = training_loader(splits.train, order, augmentation(config, task, splits.train))
    wrapped, prepared, loader = accelerator.prepare(model, optimizer, loader)
    rate, smoothing, given = config.recipe_dropout, config.recipe_smoothing, loss
    dropout = Dropout(rate).criterion(loss, model, config.seed) if rate else None
    if smoothing:
        given = Smoothing(smoothing).criterion(loss, model, config.seed)
    learner = Learner(accelerator, wrapped, algorithm.criterion(given, model, config.seed), prepared)
    return Session(config, task, splits, learner, loss, scheduler, order, loader, dropout)


def augmentation(config: RunConfig, task: Task, samples: Arrays) -> Augment | None:
    """What changes training pictures at random: the task's, or the recipe's, by up to an eighth of their side."""
    name, inputs = config.recipe_augment, samples.inputs
    if name in ("task", "none"):
        return task.augment if name == "task" else None
    if not samples.pictures or not isinstance(inputs, torch.Tensor):
        raise ConfigError(f"recipe_augment={name!r} is for pictures with class labels, which this task has not.")
    return partial(shift if name == "shift" else crop_flip, pad=inputs.shape[-1] // 8)


def a_module(part: str, made: Any) -> nn.Module:
    """What a task's model or loss gave, unless that is something else, such as a function or a class."""
    if not isinstance(made, nn.Module):
        raise ConfigError(
            f"The task's {part}() gives {made!r}, but must give a torch.nn.Module"
            + ("; for a function, write a module that calls it." if part == "loss" else ".")
        )
    return made


def accelerator_for(config: RunConfig, logs: Path | None) -> Accelerator:
    """What moves a run to its devices, casts its forward passes and keeps its scalars."""
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("precision='fp16' needs a GPU; use precision='bf16' on a CPU.")
    AcceleratorState._reset_state()  # it belongs to the process and would keep the last run's precision
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=config.precision,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        log_with=None if logs is None else "tensorboard",
        project_dir=logs,
    )
