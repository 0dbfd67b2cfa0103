"""What is kept of a run: the numbers of an epoch, and those at the end.

Nothing here chooses anything by the test split. It is evaluated once, after the last epoch, and only
when the caller asks for it.
"""

import math
from statistics import median_high
from typing import Any

from relflat import Flatness
from relflat.errors import NonFiniteError
from relflat.lab.data.arrays import Arrays
from relflat.lab.train.evaluate import evaluate, flatness
from relflat.lab.train.session import Session

Record = dict[str, Any]


def monitor(session: Session) -> Record:
    """Metric, loss and kappa after an epoch, on the first samples of the training and validation splits.

    Every process takes them, on all of these samples; they agree, as the weights do.
    """
    task, splits = session.task, session.splits
    train, name = splits.train.take(slice(task.monitored)), task.metric.name
    with session.full_precision():
        fitted = judge(session, train)
        held_out = judge(session, splits.validation.take(slice(task.monitored)))
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
        return result | evaluated(session, test)
    except NonFiniteError as error:
        return result | {"status": "diverged", "reason": str(error)}


def evaluated(session: Session, test: bool) -> Record:
    """What the trained network does on each split, and its flatness on the training data.

    Raises:
        NonFiniteError: a loss is infinite or not a number.
    """
    splits = session.splits
    found: Record = {name: judge(session, getattr(splits, name)) for name in ("train", "validation")}
    found["flatness"] = kappa(session, splits.train).__dict__
    if test:
        found["test"] = judge(session, splits.test())
        if splits.shifts:
            found["shifts"] = {name: judge(session, other()) for name, other in splits.shifts.items()}
    return found


def kappa_before(session: Session) -> float:
    """Kappa of the untrained network on the first training samples; a resumed run takes it from the same one."""
    return kappa(session, session.splits.train.take(slice(session.task.monitored))).value


def kappa(session: Session, samples: Arrays) -> Flatness:
    """Relative flatness of the layer that the task follows."""
    return flatness(session.model, session.loss, session.batches(samples), session.task.layer)


def judge(session: Session, samples: Arrays) -> Record:
    """What the task's metric says of some samples.

    Raises:
        NonFiniteError: the loss on them is infinite or not a number.
    """
    found = evaluate(session.task.metric, session.model, session.loss, session.batches(samples))
    if not math.isfinite(found["loss"]):
        raise NonFiniteError(f"The loss is {found['loss']} in evaluation; lower lr or strength.")
    return found
