"""The training loop: one for all algorithms, on Accelerate, resumable after any epoch.

Nothing here chooses anything by the test split. It is evaluated once, after the last epoch, and only
when the caller asks for it.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from relflat.errors import ConfigError, NonFiniteError
from relflat.lab.data.arrays import Arrays
from relflat.lab.data.batches import Batch, EpochOrder, in_order, training_loader
from relflat.lab.data.splits import Splits
from relflat.lab.tasks import own
from relflat.lab.tasks.catalogue import task_named
from relflat.lab.train import checkpoint, store
from relflat.lab.train.algorithms import ALGORITHMS, Learner, release
from relflat.lab.train.config import RunConfig
from relflat.lab.train.evaluate import evaluate, flatness
from relflat.lab.train.lock import alone_in
from relflat.lab.train.scalars import Scalars

Record = dict[str, Any]
OnEpoch = Callable[[Record], None]


def ignore(record: Record) -> None:
    """Do nothing with an epoch's record."""


@dataclass
class Session:
    """A run's moving parts, built from its configuration alone.

    Attributes:
        config: the run.
        splits: its data.
        learner: model, criterion and optimiser.
        loss: the bare task loss, for evaluating.
        scheduler: learning rate.
        order: of the training data.
        loader: of the training data.
    """

    config: RunConfig
    splits: Splits
    learner: Learner
    loss: nn.Module
    scheduler: LRScheduler
    order: EpochOrder
    loader: Any

    @property
    def model(self) -> nn.Module:
        """The network without the wrappers that Accelerate may have put around it."""
        return self.learner.accelerator.unwrap_model(self.learner.model)

    @property
    def writes(self) -> bool:
        """Whether this is the process that keeps the run's folder; always, where there is but one."""
        return bool(self.learner.accelerator.is_main_process)

    @contextmanager
    def first_alone(self, folder: Path, fresh: bool) -> Iterator[None]:
        """Make the folder ready and hold it; the other processes wait until it is, and go on together."""
        if not self.writes:
            self.learner.accelerator.wait_for_everyone()
            yield
            return
        store.open_run(folder, self.config, fresh=fresh)
        with alone_in(folder):
            store.remove_unfinished(folder)
            self.learner.accelerator.wait_for_everyone()
            yield

    def batches(self, samples: Arrays) -> Iterator[Batch]:
        """Samples in their order on the run's device, for evaluating."""
        size = task_named(self.config.task).evaluation_size
        return in_order(samples, self.learner.accelerator.device, size)

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
        release(self.learner.criterion)


def build(config: RunConfig) -> Session:
    """Seed everything and build a run's data, network, criterion and optimiser."""
    task, algorithm = task_named(config.task), ALGORITHMS[config.algorithm]
    splits = task.splits(train_size=config.train_size, label_noise=config.label_noise, seed=config.seed)
    set_seed(config.seed)
    accelerator = accelerator_for(config)
    if config.batch_size % accelerator.num_processes:
        raise ConfigError(
            f"batch_size={config.batch_size} cannot be shared evenly by {accelerator.num_processes} processes; "
            f"give a multiple of {accelerator.num_processes}."
        )
    model, loss = a_module("model", task.model()), a_module("loss", task.loss())
    base = replace(task.optimizer, lr=config.lr, weight_decay=config.weight_decay)
    optimizer = algorithm.optimizer(model.parameters(), base, config.settings)
    order = EpochOrder(len(splits.train), config.batch_size, config.seed)
    scheduler = task.schedule(_base(optimizer), config.epochs * len(order))
    wrapped, prepared, loader = accelerator.prepare(
        model, optimizer, training_loader(splits.train, order, task.augment)
    )
    criterion = algorithm.criterion(loss, model, config.settings, config.seed)
    return Session(
        config, splits, Learner(accelerator, wrapped, criterion, prepared), loss, scheduler, order, loader
    )


def a_module(part: str, made: Any) -> nn.Module:
    """What a task's model or loss gave, if it is a module.

    Raises:
        ConfigError: it is something else, such as a function or the class in place of an object.
    """
    if not isinstance(made, nn.Module):
        raise ConfigError(
            f"The task's {part}() gives {made!r}, but must give a torch.nn.Module"
            + ("; for a function, write a module that calls it." if part == "loss" else ".")
        )
    return made


def accelerator_for(config: RunConfig) -> Accelerator:
    """What moves a run to its devices and casts its forward passes.

    Raises:
        ConfigError: fp16 without a GPU.
    """
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("precision='fp16' needs a GPU; use precision='bf16' on a CPU.")
    if AcceleratorState._shared_state.get("_mixed_precision", config.precision) != config.precision:
        AcceleratorState._reset_state()  # it belongs to the process and would keep the last run's precision
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=config.precision,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )


def _base(optimizer: Optimizer) -> Optimizer:
    """The optimiser whose learning rate counts: SAM's inner one."""
    return getattr(optimizer, "base_optimizer", optimizer)


def train(
    config: RunConfig,
    folder: Path,
    *,
    test: bool = True,
    fresh: bool = False,
    tensorboard: bool = True,
    on_epoch: OnEpoch = ignore,
) -> Record:
    """Train, or go on where an interrupted run of this folder stopped; a finished one is only read.

    Args:
        config: the run.
        folder: where its files go.
        test: whether the test split is evaluated at the end.
        fresh: remove an earlier run of this folder.
        tensorboard: write scalars for TensorBoard.
        on_epoch: called with each epoch's record.

    Returns:
        The content of ``result.json``.

    Raises:
        ConfigError: the folder holds another run or cannot be written.
        DataError: the data set was not fetched.
    """
    store.check_folder(folder, config, fresh=fresh)
    finished = None if fresh else store.result_of(folder)
    if finished is not None and (
        finished["test"] is not None or not test or finished["status"] != "finished"
    ):
        return finished
    with own.blamed(config.task):
        session = build(config)
        try:
            with session.first_alone(folder, fresh):
                return _run(session, folder, test, tensorboard, on_epoch)
        finally:
            session.close()


def _run(session: Session, folder: Path, test: bool, tensorboard: bool, on_epoch: OnEpoch) -> Record:
    """Do what is left of the run in a folder that is held."""
    with session.full_precision():
        before = _kappa_before(session)
    history = _resume(session, folder)
    diverged = _epochs(session, folder, history, tensorboard and session.writes, on_epoch)
    with session.full_precision():
        try:
            result = _result(session, before, history, diverged, test)
        except NonFiniteError as error:
            result = _result(session, before, history, str(error), test)
    result = store.as_json(result)
    if session.writes:
        with store.writing(folder):
            store.write_json(folder / store.RESULT, result)
    return result


def _resume(session: Session, folder: Path) -> list[Record]:
    """Go back to the newest checkpoint, the metrics with it; return its history."""
    history = checkpoint.load(
        folder,
        model=session.model,
        criterion=session.learner.criterion,
        optimizer=session.learner.optimizer,
        scheduler=session.scheduler,
        scaler=session.learner.accelerator.scaler,
    )
    if history and session.writes:  # a process killed between the two leaves the checkpoint an epoch ahead
        with store.writing(folder):
            store.write_lines(folder / store.METRICS, history)
            checkpoint.remove_old(folder)
    return history


def _epochs(
    session: Session, folder: Path, history: list[Record], tensorboard: bool, on_epoch: OnEpoch
) -> str | None:
    """Train the epochs that are left, appending to ``history``; return why training broke off, or None."""
    with Scalars(folder, len(history), active=tensorboard) as scalars:
        for epoch in range(len(history), session.config.epochs):
            try:
                record = run_epoch(session, epoch)
            except NonFiniteError as error:
                return str(error)
            history.append(record)
            if session.writes:
                with store.writing(folder):
                    _keep(session, folder, history)
                    scalars.add(record)
                on_epoch(record)
    return None


def _keep(session: Session, folder: Path, history: list[Record]) -> None:
    checkpoint.save(
        folder,
        epoch=len(history),
        model=session.model,
        criterion=session.learner.criterion,
        optimizer=session.learner.optimizer,
        scheduler=session.scheduler,
        scaler=session.learner.accelerator.scaler,
        history=history,
    )
    store.write_lines(folder / store.METRICS, history)


def run_epoch(session: Session, epoch: int) -> Record:
    """One pass over the training data, then the epoch's metrics."""
    learner, step = session.learner, ALGORITHMS[session.config.algorithm].step
    learner.model.train()
    learner.criterion.train()
    session.order.epoch = epoch
    total: Any = 0.0  # a tensor after the first step: adding it up never waits for the device
    penalty = 0.0
    start = time.perf_counter()
    for inputs, targets in session.loader:
        losses = step(learner, inputs, targets)
        session.scheduler.step()
        total += losses.total
        penalty += losses.penalty
    steps = len(session.order)
    loss, penalty = (_mean(session, value) for value in (float(total), penalty))
    loss /= steps
    seconds = time.perf_counter() - start
    if not math.isfinite(loss):
        raise NonFiniteError(f"The training loss of epoch {epoch + 1} is {loss}; lower lr or strength.")
    return {
        "epoch": epoch + 1,
        "steps": (epoch + 1) * steps,
        "loss": loss,
        "penalty": None if math.isnan(penalty) else penalty / steps,
        **_monitor(session),
        "lr": session.scheduler.get_last_lr()[0],
        "seconds_per_step": seconds / steps,
    }


def _mean(session: Session, value: float) -> float:
    """The mean over all processes."""
    accelerator = session.learner.accelerator
    if accelerator.num_processes == 1:
        return value
    here = torch.tensor(value, dtype=torch.float32, device=accelerator.device)
    return float(accelerator.reduce(here, "mean"))


def _monitor(session: Session) -> Record:
    """Metric, loss and kappa after an epoch, on the first samples of the training and validation splits.

    Every process takes them, on all of these samples; they agree, as the weights do.
    """
    task, splits = task_named(session.config.task), session.splits
    train, name = splits.train.take(slice(task.monitored)), task.metric.name
    with session.full_precision():
        fitted = _evaluate(session, train)
        held_out = _evaluate(session, splits.validation.take(slice(task.monitored)))
        flat = flatness(session.model, session.loss, session.batches(train), task.layer)
    return {
        f"train_{name}": fitted[name],
        "train_loss": fitted["loss"],
        f"validation_{name}": held_out[name],
        "validation_loss": held_out["loss"],
        "kappa": flat.value,
        "confidence": flat.confidence,
        "weight_norm": flat.weight_norm,
        "feature_norm2": flat.feature_norm2,
    }


def _result(
    session: Session, before: float, history: list[Record], diverged: str | None, test: bool
) -> Record:
    """Everything worth keeping of a run, after its last epoch."""
    seconds = sorted(record["seconds_per_step"] for record in history)
    result: Record = {
        "status": "diverged" if diverged else "finished",
        "reason": diverged,
        "epochs": len(history),
        "steps": len(history) * len(session.order),
        "label_noise_changed": session.splits.changed,
        "train": None,
        "validation": None,
        "test": None,
        "kappa_before": before,
        "flatness": None,
        "seconds_per_step": seconds[len(seconds) // 2] if seconds else None,
    }
    if diverged:
        return result
    splits, layer = session.splits, task_named(session.config.task).layer
    result["train"] = _evaluate(session, splits.train)
    result["validation"] = _evaluate(session, splits.validation)
    batches = session.batches(splits.train)
    result["flatness"] = flatness(session.model, session.loss, batches, layer).__dict__
    if test:
        result["test"] = _evaluate(session, splits.test())
        if splits.shifts:
            result["shifts"] = {name: _evaluate(session, other()) for name, other in splits.shifts.items()}
    return result


def _kappa_before(session: Session) -> float:
    """Kappa of the untrained network on the first training samples; a resumed run takes it from the same one."""
    task = task_named(session.config.task)
    train = session.splits.train.take(slice(task.monitored))
    return flatness(session.model, session.loss, session.batches(train), task.layer).value


def _evaluate(session: Session, samples: Arrays) -> Record:
    """What the task's metric says of some samples.

    Raises:
        NonFiniteError: the loss on them is infinite or not a number.
    """
    metric = task_named(session.config.task).metric
    found = evaluate(metric, session.model, session.loss, session.batches(samples))
    if not math.isfinite(found["loss"]):
        raise NonFiniteError(f"The loss is {found['loss']} in evaluation; lower lr or strength.")
    return found
