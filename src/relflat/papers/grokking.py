"""Grokking: does relative flatness fall when generalisation sets in, and does training away from it delay that?

Modular addition, after Han et al. (2025). All arms start from the same networks; only the penalty differs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log10
from operator import gt, lt
from statistics import fmean
from typing import Any, NamedTuple

from relflat.lab.compare.trials import Trial
from relflat.lab.train.config import RunConfig
from relflat.papers import training_study
from relflat.papers.experiment import Context, Outcome, Scale
from relflat.papers.modular_addition import learnt_at
from relflat.papers.painting import curves, every_few
from relflat.papers.sheets import Sheet
from relflat.papers.training_study import train_all

SHEET = Sheet("grokking")
KNOBS: Mapping[str, Any] = SHEET["knobs"]
ARMS: Mapping[str, Mapping[str, Any]] = SHEET["arms"]
PLAIN, TOWARDS, AWAY, REMOVED = ARMS
KEPT = ("epoch", "train_accuracy", "validation_accuracy", "train_loss", "kappa", "confidence", "weight_norm")
FIGURES = {
    "validation_accuracy": "validation accuracy",
    "train_accuracy": "training accuracy",
    "kappa": "kappa, training data",
}


@dataclass(frozen=True)
class Size(training_study.Size):
    """What is run at a scale."""

    remove_after: int  # steps after which the last arm's penalty is taken away

    def of_arm(self, arm: str, seed: int) -> RunConfig:
        """The run of an arm and seed."""
        own = {"algorithm": SHEET["algorithm"], **KNOBS, **ARMS[arm]} if ARMS[arm] else {}
        return self.config(seed, **own, **({"remove_after": self.remove_after} if arm == REMOVED else {}))


SIZES = SHEET.sizes(Size)


def run(context: Context) -> Outcome:
    """Train all arms on all seeds and see when each generalises."""
    size = SIZES[context.scale]
    places = [(arm, size.of_arm(arm, seed)) for seed in size.seeds for arm in ARMS]
    return conclude(size, train_all(context, places, test=False), context.scale)


class Onset(NamedTuple):
    """When one run learnt."""

    memorised: int | None  # first epoch from which on training accuracy stays at .99 or more; None if it does not
    generalised: int | None  # the same for validation accuracy and .9
    validation: float  # validation accuracy after the last epoch
    kappa: float  # and kappa


Onsets = Sequence[Onset | None]


def onset(trial: Trial) -> Onset | None:
    """When a run learnt; None if it diverged."""
    if not trial.finished:
        return None
    memorised = learnt_at(trial.history, "train", SHEET["memorised"])
    generalised = learnt_at(trial.history, "validation", SHEET["generalised"])
    last = trial.history[-1]
    return Onset(memorised, generalised, last["validation_accuracy"], last["kappa"])


def conclude(size: Size, groups: Mapping[str, Sequence[Trial]], scale: Scale) -> Outcome:
    """What the trainings show."""
    onsets = {arm: [onset(trial) for trial in trials] for arm, trials in groups.items()}
    config = groups[PLAIN][0].config
    falls = [fall(trial.history) for trial in groups[PLAIN] if trial.finished]
    seeds = ", ".join(map(str, size.seeds))
    values = {**KNOBS, **ARMS[AWAY], "strength": ARMS[TOWARDS]["strength"], "remove_after": size.remove_after}
    values |= {key: SHEET[key] for key in ("memorised", "generalised")}
    rows = [cells(arm, each, config.epochs) for arm, each in onsets.items()]
    return Outcome(
        findings=[*findings(onsets, config.epochs), placed([each for each in falls if each is not None])],
        tables=[SHEET.table("onsets", rows, seeds=seeds, **values)],
        figures=[SHEET.figure(key, curves(groups, key, label)) for key, label in FIGURES.items()],
        scaled=SHEET.differs(scale, epochs=config.epochs, batch_size=config.batch_size, seeds=len(size.seeds)),
        data={
            "arms": {arm: [everything(trial) for trial in trials] for arm, trials in groups.items()},
            "falls_of_plain_runs": falls,
        },
    )


def everything(trial: Trial) -> dict[str, Any]:
    """The numbers of one run: at most 60 of its epochs, evenly spread, the last one among them."""
    history = [{key: record[key] for key in KEPT} for record in every_few(trial.history, 60)]
    found = onset(trial)
    return {"seed": trial.config.seed, "onset": found and found._asdict(), "history": history}


def fall(history: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """By how many powers of ten kappa falls before and while generalisation sets in; None if it does not.

    ``before``: from its highest value to the epoch where validation accuracy first passes .1; ``during``: from there
    to where it stays above .9; ``confidence``: at the first of these epochs.
    """
    end = learnt_at(history, "validation", SHEET["generalised"])
    if end is None:
        return None
    begin = next(at for at, record in enumerate(history) if record["validation_accuracy"] > SHEET["begins"])
    kappas = [record["kappa"] for record in history]
    return {
        "before": log10(max(kappas[: begin + 1]) / kappas[begin]),
        "during": log10(kappas[begin] / kappas[end - 1]),
        "confidence": history[begin]["confidence"],
    }


def findings(onsets: Mapping[str, Onsets], epochs: int) -> list[str]:
    """When each arm generalises, against plain training on the same seeds."""
    plain = onsets[PLAIN]
    found = [SHEET.say("plain", when=when(plain, epochs))]
    for arm in (TOWARDS, AWAY, REMOVED):
        counts = {"n": len(plain), **order(plain, onsets[arm], epochs)}
        found.append(SHEET.say("arm", arm=arm.capitalize(), when=when(onsets[arm], epochs), **counts))
    return [*found, restored(plain, onsets[AWAY], onsets[REMOVED], epochs)]


def when(onsets: Onsets, epochs: int) -> str:
    """The epochs of the seeds."""
    known = ["diverged" if each is None else each.generalised or f"not in {epochs}" for each in onsets]
    return ", ".join(map(str, known))


def order(plain: Onsets, other: Onsets, epochs: int) -> dict[str, int]:
    """On how many seeds the other generalises earlier, later, or cannot be told; never is later than any epoch."""
    at, against = ([(found and found.generalised) or epochs + 1 for found in onsets] for onsets in (plain, other))
    earlier, later = sum(map(gt, at, against)), sum(map(lt, at, against))
    return {"earlier": earlier, "later": later, "same": len(at) - earlier - later}


def restored(plain: Onsets, away: Onsets, removed: Onsets, epochs: int) -> str:
    """Whether a negative strength delays generalisation and taking it away brings it back."""
    n, delayed, back = len(plain), order(plain, away, epochs)["later"], order(away, removed, epochs)["earlier"]
    key = "not_reproduced" if delayed < n else "in_part" if back < n else "reproduced"
    return SHEET.say(key, n=n, delayed=delayed, back=back)


def placed(falls: Sequence[Mapping[str, float]]) -> str:
    """Where kappa falls in plain training."""
    if not falls:
        return SHEET.say("no_fall")
    means = {key: fmean(each[key] for each in falls) for key in falls[0]}
    said = SHEET.say("fall", **means, begins=SHEET["begins"], n=len(falls))
    return said + (SHEET.say("before", **means) if means["before"] > 0.5 else "")


def cells(arm: str, onsets: Onsets, epochs: int) -> tuple[str, ...]:
    """When an arm knows the training data by heart, and when it generalises."""
    there = [found for found in onsets if found is not None]
    return (
        arm,
        ", ".join(str(found.memorised or "never") for found in there),
        when(onsets, epochs),
        ", ".join(f"{found.validation:.3f}" for found in there),
        ", ".join(f"{found.kappa:.3g}" for found in there),
    )
