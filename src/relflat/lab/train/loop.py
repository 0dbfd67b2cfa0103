"""The training loop: one for all algorithms, on Accelerate, resumable after any epoch."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from relflat.errors import NonFiniteError
from relflat.lab.tasks import own
from relflat.lab.train import checkpoint, store
from relflat.lab.train.results import Record, final, kappa_before, monitor
from relflat.lab.train.session import Session, build
from relflat.lab.train.settings import RunConfig

OnEpoch = Callable[[Record], None]


def ignore(record: Record) -> None:
    """Do nothing with an epoch's record."""


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
    if finished is not None and (finished["test"] is not None or not test or finished["status"] != "finished"):
        return finished
    with own.blamed(config.task):
        session = build(config, folder if tensorboard else None)
        try:
            with first_alone(session, folder, fresh):
                return _run(session, folder, test, on_epoch)
        finally:
            session.close()


@contextmanager
def first_alone(session: Session, folder: Path, fresh: bool) -> Iterator[None]:
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
    with session.full_precision():
        before = kappa_before(session)
    history = _resume(session, folder)
    diverged = _epochs(session, folder, history, on_epoch)
    with session.full_precision():
        result = store.as_json(final(session, before, history, diverged, test))
    if session.writes:
        with store.writing(folder):
            store.write_json(folder / store.RESULT, result)
    return result


def _resume(session: Session, folder: Path) -> list[Record]:
    """Go back to the newest checkpoint, the metrics with it; return its history."""
    history = checkpoint.load(folder, session)
    if history and session.writes:  # a process killed between the two leaves the checkpoint an epoch ahead
        with store.writing(folder):
            store.write_lines(folder / store.METRICS, history)
            checkpoint.remove_old(folder)
    return history


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
    loss, penalty = (session.mean(value) for value in (float(total), penalty))
    loss /= steps
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
