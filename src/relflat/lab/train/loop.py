"""The training loop: one for all algorithms, on Accelerate, resumable after any epoch.

Nothing here chooses anything by the test split. It is evaluated once, after the last epoch, and only when the caller
asks for it.
"""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from statistics import median_high
from typing import Any

from relflat import Flatness, relative_flatness
from relflat.errors import NonFiniteError
from relflat.lab.data.arrays import Arrays
from relflat.lab.data.corrupt import corruptions
from relflat.lab.tasks import own
from relflat.lab.tasks.metrics import evaluate
from relflat.lab.train import checkpoint, store
from relflat.lab.train.config import RunConfig
from relflat.lab.train.session import Session, build

SPLITS = ("train", "validation", "test")
CORRUPTED = 2000
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

    With ``test`` the test split is evaluated, last; ``fresh`` removes an earlier run of this folder; ``on_epoch``
    is called with each epoch's record. What is returned is the content of ``result.json``.

    Raises:
        ConfigError: the folder holds another run or cannot be written.
        DataError: the data set was not fetched.
    """
    store.check_folder(folder, config, fresh=fresh)
    if not fresh and (done := store.finished(folder, test)) is not None:
        return done
    logs = folder if tensorboard else None
    with own.blamed(config.task), closing(build(config, logs)) as session, ExitStack() as held:
        if session.writes:
            held.enter_context(store.alone_in(folder, 0 if fresh else store.PATIENCE))
            store.check_folder(folder, config, fresh=fresh)  # once more: another process may have been here
            store.open_run(folder, config, fresh=fresh)
        session.accelerator.wait_for_everyone()  # until the folder is made and held
        if (done := store.finished(folder, test)) is not None:
            return done
        return _run(session, folder, test, on_epoch)


def _run(session: Session, folder: Path, test: bool, on_epoch: OnEpoch) -> Record:
    """Do what is left of the run in a folder that is held."""
    with session.full_precision():  # kappa of the untrained network; a resumed run takes it from the same one
        before = kappa(session, session.splits.train.take(slice(session.task.monitored))).value
    history = checkpoint.load(folder, **session.parts)
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
    drop = {"purge_step": len(history) + 1}  # scalars that an interrupted run wrote after its last checkpoint
    session.accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": drop})
    try:
        for epoch in range(len(history), session.config.epochs):
            record = run_epoch(session, epoch)
            history.append(record)
            if session.writes:
                with store.writing(folder):
                    checkpoint.save(folder, epoch=len(history), history=history, **session.parts)
                    store.write_lines(folder / store.METRICS, history)
                    numbers = {name: value for name, value in record.items() if isinstance(value, float)}
                    session.accelerator.log(numbers, step=record["epoch"])
                on_epoch(record)
    except NonFiniteError as error:
        return str(error)
    finally:
        for tracker in session.accelerator.trackers:
            tracker.finish()
    return None


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
    if not all(bool(weight.isfinite().all()) for weight in session.model.parameters() if weight.requires_grad):
        raise NonFiniteError(f"Weights are not finite after epoch {epoch + 1}; lower lr or strength.")
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
        **{key: getattr(flat, key) for key in ("confidence", "weight_norm", "feature_norm2")},
    }


def final(session: Session, before: float, history: list[Record], diverged: str | None, test: bool) -> Record:
    """Everything worth keeping of a run, after its last epoch; ``before`` is kappa of the untrained network."""
    splits, name = session.splits, session.task.metric.name
    seconds = [record["seconds_per_step"] for record in history]
    result: Record = {
        "status": "diverged" if diverged else "finished",
        "reason": diverged,
        "epochs": len(history),
        "steps": len(history) * len(session.order),
        "label_noise_changed": splits.changed,
        **dict.fromkeys(SPLITS),
        "kappa_before": before,
        "flatness": None,
        "seconds_per_step": median_high(seconds) if seconds else None,
    }
    if diverged:
        return result
    try:
        found: Record = {"train": judge(session, splits.train), "validation": judge(session, splits.validation)}
        found["flatness"] = kappa(session, splits.train).__dict__
        if test:
            found["test"] = judge(session, tested := splits.test())
            found["corrupted"] = corrupted(session, tested)
        if test and splits.shifts:
            found["shifts"] = {name: judge(session, other()) for name, other in splits.shifts.items()}
        for split, judged in {**found, **found.get("shifts", {})}.items():
            if not math.isfinite(value := judged.get(name, 0.0)):
                raise NonFiniteError(f"The task's metric {name} is {value} on {split} data.")
    except NonFiniteError as error:
        found = {"status": "diverged", "reason": str(error)}
    return result | found


def corrupted(session: Session, tested: Arrays) -> Record:
    """Metric and loss on corrupted test pictures, by corruption, one entry a severity; none of other data.

    Of many pictures every k-th is taken, so that there are at most `CORRUPTED`.
    """
    some, metric, found = tested.take(slice(None, None, -(-len(tested) // CORRUPTED))), session.task.metric, Record()
    for name, changed in corruptions(some.inputs) if tested.pictures else ():
        judged = evaluate(metric, session.model, session.loss, session.batches(replace(some, inputs=changed)))
        found.setdefault(name, []).append({key: judged[key] for key in (metric.name, "loss")})
    return found


def kappa(session: Session, samples: Arrays) -> Flatness:
    """Relative flatness of the layer that the task follows."""
    batches = list(session.batches(samples))
    return relative_flatness(session.model, session.loss, batches, layer=session.task.layer)


def judge(session: Session, samples: Arrays) -> Record:
    """What the task's metric says of some samples, where the loss on them is finite."""
    found = evaluate(session.task.metric, session.model, session.loss, session.batches(samples))
    if not math.isfinite(found["loss"]):
        raise NonFiniteError(f"The loss is {found['loss']} in evaluation; lower lr or strength.")
    return found
