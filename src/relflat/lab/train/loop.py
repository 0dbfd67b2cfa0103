"""The training loop: one for all algorithms, on Accelerate, resumable after any epoch.

Nothing here chooses anything by the test split. It is evaluated once, after the last epoch, and only when the caller
asks for it.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median_high
from typing import Any

from relflat import Flatness, relative_flatness
from relflat.errors import NonFiniteError
from relflat.lab.data.arrays import Arrays
from relflat.lab.tasks import own
from relflat.lab.train import checkpoint, store
from relflat.lab.train.config import RunConfig
from relflat.lab.train.evaluate import evaluate
from relflat.lab.train.session import Session, build

Record = dict[str, Any]
OnEpoch = Callable[[Record], None]


def train(
    config: RunConfig,
    folder: Path,
    *,
    test: bool = True,
    fresh: bool = False,
    tensorboard: bool = True,
    on_epoch: OnEpoch = lambda record: None,
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
    if finished is not None and (finished["test"] is not None or not test or finished["status"] != "finished"):
        return finished
    with own.blamed(config.task):
        session = build(config, folder if tensorboard else None)
        try:
            with _first_alone(session, folder, fresh):
                return _run(session, folder, test, on_epoch)
        finally:
            session.close()


@contextmanager
def _first_alone(session: Session, folder: Path, fresh: bool) -> Iterator[None]:
    """Make the folder ready and hold it; the other processes wait until it is, and go on together."""
    if not session.writes:
        session.accelerator.wait_for_everyone()
        yield
        return
    store.open_run(folder, session.config, fresh=fresh)
    with store.alone_in(folder):
        store.remove_unfinished(folder)
        session.accelerator.wait_for_everyone()
        yield


def _run(session: Session, folder: Path, test: bool, on_epoch: OnEpoch) -> Record:
    """Do what is left of the run in a folder that is held."""
    with session.full_precision():  # kappa of the untrained network; a resumed run takes it from the same one
        before = kappa(session, session.splits.train.take(slice(session.task.monitored))).value
    history = checkpoint.load(folder, session)
    if history and session.writes:  # a process killed between the two leaves the checkpoint an epoch ahead
        with store.writing(folder):
            store.write_lines(folder / store.METRICS, history)
            checkpoint.remove_old(folder)
    diverged = _epochs(session, folder, history, on_epoch)
    with session.full_precision():
        result = store.as_json(final(session, before, history, diverged, test))
    if session.writes:
        with store.writing(folder):
            store.write_json(folder / store.RESULT, result)
    return result


def _epochs(session: Session, folder: Path, history: list[Record], on_epoch: OnEpoch) -> str | None:
    """Train the epochs that are left, appending to ``history``; return why training broke off, or None."""
    with _scalars(session, len(history)):
        for epoch in range(len(history), session.config.epochs):
            try:
                record = run_epoch(session, epoch)
            except NonFiniteError as error:
                return str(error)
            history.append(record)
            if session.writes:
                with store.writing(folder):
                    checkpoint.save(folder, session, history)
                    store.write_lines(folder / store.METRICS, history)
                    numbers = {name: value for name, value in record.items() if isinstance(value, float)}
                    session.accelerator.log(numbers, step=record["epoch"])
                on_epoch(record)
    return None


@contextmanager
def _scalars(session: Session, done: int) -> Iterator[None]:
    """Keep the numbers of epochs in ``<run>/tensorboard``, where the session was built to do so.

    What an interrupted run wrote after its last checkpoint is dropped.
    """
    session.accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": done + 1}})
    try:
        yield
    finally:
        for tracker in session.accelerator.trackers:
            tracker.finish()


def run_epoch(session: Session, epoch: int) -> Record:
    """One pass over the training data, then the epoch's metrics."""
    learner, step = session.learner, session.config.settings.step
    session.training()
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
    loss, penalty = session.mean(float(total)) / steps, session.mean(penalty)
    seconds = time.perf_counter() - start
    if not math.isfinite(loss):
        raise NonFiniteError(f"The training loss of epoch {epoch + 1} is {loss}; lower lr or strength.")
    return {
        "epoch": epoch + 1,
        "steps": (epoch + 1) * steps,
        "loss": loss,
        "penalty": None if math.isnan(penalty) else penalty / steps,
        **monitor(session),
        "lr": session.scheduler.get_last_lr()[0],
        "seconds_per_step": seconds / steps,
    }


def monitor(session: Session) -> Record:
    """Metric, loss and kappa after an epoch, on the first samples of the training and validation splits.

    Every process takes them, on all of these samples; they agree, as the weights do.
    """
    name, first = session.task.metric.name, slice(session.task.monitored)
    train = session.splits.train.take(first)
    with session.full_precision():
        fitted, held_out = judge(session, train), judge(session, session.splits.validation.take(first))
        flat = kappa(session, train)
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


def final(session: Session, before: float, history: list[Record], diverged: str | None, test: bool) -> Record:
    """Everything worth keeping of a run, after its last epoch; ``before`` is kappa of the untrained network."""
    seconds = [record["seconds_per_step"] for record in history]
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
        "seconds_per_step": median_high(seconds) if seconds else None,
    }
    if diverged:
        return result
    try:
        return result | _evaluated(session, test)
    except NonFiniteError as error:
        return result | {"status": "diverged", "reason": str(error)}


def _evaluated(session: Session, test: bool) -> Record:
    """What the trained network does on each split, and its flatness on the training data."""
    splits = session.splits
    found: Record = {name: judge(session, getattr(splits, name)) for name in ("train", "validation")}
    found["flatness"] = kappa(session, splits.train).__dict__
    if test:
        found["test"] = judge(session, splits.test())
        if splits.shifts:
            found["shifts"] = {name: judge(session, other()) for name, other in splits.shifts.items()}
    return found


def kappa(session: Session, samples: Arrays) -> Flatness:
    """Relative flatness of the layer that the task follows."""
    batches = list(session.batches(samples))
    return relative_flatness(session.model, session.loss, batches, layer=session.task.layer)


def judge(session: Session, samples: Arrays) -> Record:
    """What the task's metric says of some samples.

    Raises:
        NonFiniteError: the loss on them is infinite or not a number.
    """
    found = evaluate(session.task.metric, session.model, session.loss, session.batches(samples))
    if not math.isfinite(found["loss"]):
        raise NonFiniteError(f"The loss is {found['loss']} in evaluation; lower lr or strength.")
    return found
