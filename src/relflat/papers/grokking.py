"""Grokking: does relative flatness fall when generalisation sets in, and does training away from it delay that?

Modular addition, after Han et al. (2025). All arms start from the same networks; only the penalty differs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import log10
from pathlib import Path
from statistics import fmean
from typing import Any

from relflat.lab.compare.trials import Job, Trial, run_all, workers
from relflat.lab.report.figures import curves, every_few
from relflat.lab.tasks.grokking import learnt_at
from relflat.lab.train.config import RunConfig, make
from relflat.papers.experiment import Context, Experiment, Figure, Outcome, Scale, Table

GENERALISED, MEMORISED = 0.9, 0.99  # accuracies on validation and training data
SETS_IN = 0.1  # validation accuracy at which generalisation has begun
KNOBS: Mapping[str, Any] = {"temperature": 2.0, "unit_features": True}
Grokked = Mapping[str, Sequence[Trial]]


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        title: in tables and figures.
        settings: what it gives `relflat.lab.train.config.make`, beside task, seed and budget.
    """

    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What is run at a scale.

    Attributes:
        common: of all runs: task, epochs, batch size.
        strength: of the penalty with either sign, with Han et al.'s temperature and unit features.
        cap: greatest norm of the output weight while the strength is negative.
        remove_after: steps after which the last arm's penalty is taken away.
        seeds: of initial weights and data order.
    """

    common: Mapping[str, Any]
    strength: float
    cap: float
    remove_after: int
    seeds: tuple[int, ...]

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Plain training first."""
        towards = {"algorithm": "fam-grokking", "strength": self.strength, **KNOBS}
        away = {**towards, "strength": -self.strength, "weight_cap": self.cap}
        return (
            Arm("plain"),
            Arm("towards flat", towards),
            Arm("away from flat", away),
            Arm("away, removed", {**away, "remove_after": self.remove_after}),
        )

    def config(self, arm: Arm, seed: int) -> RunConfig:
        """The run of an arm and seed."""
        return make({**self.common, **arm.settings, "seed": seed})


SMALL = f"{Path(__file__).with_name('additions.py')}:small"
PLANS: dict[Scale, Plan] = {
    "small": Plan({"task": SMALL}, 0.1, 20.0, 900, (0, 1, 2)),
    "paper": Plan({"task": "addition"}, 0.1, 20.0, 1000, tuple(range(5))),
}


def run(context: Context, plan: Plan | None = None) -> Outcome:
    """Train all arms on all seeds and see when each generalises.

    Args:
        context: scale, folders, workers.
        plan: in place of that of the scale.
    """
    plan = plan or PLANS[context.scale]
    places = [(arm, seed) for seed in plan.seeds for arm in plan.arms]
    jobs = [Job(plan.config(arm, seed), context.runs, test=False) for arm, seed in places]
    with workers(context.workers) as pool:
        trials = run_all(pool, jobs, context.counter("trainings", len(jobs)))
    groups: dict[str, list[Trial]] = {arm.title: [] for arm in plan.arms}
    for (arm, _), trial in zip(places, trials, strict=True):
        groups[arm.title].append(trial)
    return conclude(plan, groups, context.scale)


@dataclass(frozen=True)
class Onset:
    """When one run learnt.

    Attributes:
        memorised: first epoch from which on training accuracy stays at .99 or more; None if it does not.
        generalised: the same for validation accuracy and .9.
        validation: validation accuracy after the last epoch.
        kappa: kappa after the last epoch.
    """

    memorised: int | None
    generalised: int | None
    validation: float
    kappa: float


def onset(trial: Trial) -> Onset | None:
    """When a run learnt; None if it diverged."""
    if not trial.finished:
        return None
    last = trial.history[-1]
    return Onset(
        learnt_at(trial.history, "train", MEMORISED),
        learnt_at(trial.history, "validation", GENERALISED),
        last["validation_accuracy"],
        last["kappa"],
    )


def conclude(plan: Plan, groups: Grokked, scale: Scale) -> Outcome:
    """What the trainings show."""
    onsets = {title: [onset(trial) for trial in trials] for title, trials in groups.items()}
    epochs = next(iter(groups.values()))[0].config.epochs
    falls = [fall(trial.history) for trial in groups["plain"] if trial.finished]
    return Outcome(
        findings=[*findings(onsets, epochs), *fall_findings([each for each in falls if each is not None])],
        tables=[table(onsets, epochs, plan)],
        figures=[
            Figure(
                title, partial(_paint, groups, key, label), "Line: mean over the seeds; band: their range."
            )
            for title, key, label in (
                ("Validation accuracy", "validation_accuracy", "validation accuracy"),
                ("Training accuracy", "train_accuracy", "training accuracy"),
                ("Kappa of the output layer", "kappa", "kappa, training data"),
            )
        ],
        scaled=scaled(plan, scale),
        data={
            "arms": {
                title: [
                    {
                        "seed": trial.config.seed,
                        "onset": None if found is None else vars(found),
                        "history": thinned(trial.history),
                    }
                    for trial, found in zip(groups[title], onsets[title], strict=True)
                ]
                for title in groups
            },
            "falls_of_plain_runs": falls,
        },
    )


def _paint(groups: Grokked, key: str, label: str, axes: Any) -> None:
    curves(groups, key, label)(axes)


def thinned(history: Sequence[Mapping[str, Any]], most: int = 60) -> list[dict[str, Any]]:
    """At most so many epochs of a run, evenly spread, the last one among them."""
    keys = (
        "epoch",
        "train_accuracy",
        "validation_accuracy",
        "train_loss",
        "kappa",
        "confidence",
        "weight_norm",
    )
    return [{key: record[key] for key in keys} for record in every_few(history, most)]


def fall(history: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """By how many powers of ten kappa falls before and while generalisation sets in; None if it does not.

    Returns:
        ``before``: from its highest value to the epoch where validation accuracy first passes .1;
        ``during``: from there to where it stays above .9; ``confidence``: at the first of these epochs.
    """
    end = learnt_at(history, "validation", GENERALISED)
    if end is None:
        return None
    begin = next(place for place, record in enumerate(history) if record["validation_accuracy"] > SETS_IN)
    kappas = [record["kappa"] for record in history]
    return {
        "before": log10(max(kappas[: begin + 1]) / kappas[begin]),
        "during": log10(kappas[begin] / kappas[end - 1]),
        "confidence": history[begin]["confidence"],
    }


# -- in words ----------------------------------------------------------------------------------------------------


def findings(onsets: Mapping[str, Sequence[Onset | None]], epochs: int) -> list[str]:
    """When each arm generalises, against plain training on the same seeds."""
    plain, *others = onsets
    found = [f"Plain training generalises at {when(onsets[plain], epochs)}."]
    for title in others:
        earlier, later, same = order(onsets[plain], onsets[title], epochs)
        counts = f"{earlier} of {len(onsets[title])} seeds earlier than plain, {later} later, {same} neither"
        found.append(f"{title.capitalize()}: generalises at {when(onsets[title], epochs)}; {counts}.")
    away, removed = list(onsets)[2:4]
    found.append(restored(onsets[plain], onsets[away], onsets[removed], epochs))
    return found


def when(onsets: Sequence[Onset | None], epochs: int) -> str:
    """The epochs of the seeds."""
    texts = [
        "diverged"
        if each is None
        else f"not in {epochs}"
        if each.generalised is None
        else str(each.generalised)
        for each in onsets
    ]
    return f"epoch {', '.join(texts)}"


def order(plain: Sequence[Onset | None], other: Sequence[Onset | None], epochs: int) -> tuple[int, int, int]:
    """On how many seeds the other generalises earlier, later, or cannot be told; never is later than any epoch."""
    pairs = [(at(a, epochs), at(b, epochs)) for a, b in zip(plain, other, strict=True)]
    earlier, later = (sum((b - a) * sign > 0 for a, b in pairs) for sign in (-1, 1))
    return earlier, later, len(pairs) - earlier - later


def at(found: Onset | None, epochs: int) -> int:
    """The epoch of generalisation; the one after the last if there was none."""
    return epochs + 1 if found is None or found.generalised is None else found.generalised


def restored(
    plain: Sequence[Onset | None],
    away: Sequence[Onset | None],
    removed: Sequence[Onset | None],
    epochs: int,
) -> str:
    """Whether a negative strength delays generalisation and taking it away brings it back."""
    n = len(plain)
    delayed, back = order(plain, away, epochs)[1], order(away, removed, epochs)[0]
    if delayed == back == n:
        return (
            "Reproduced: on every seed the negative strength delays generalisation, and taking it away brings it "
            "back."
        )
    if delayed == n:
        return (
            f"Reproduced in part: the negative strength delays generalisation on every seed; taking it away brings "
            f"it back earlier on {back} of {n} seeds."
        )
    return f"Not reproduced: the negative strength delays generalisation on {delayed} of {n} seeds only."


def fall_findings(falls: Sequence[Mapping[str, float]]) -> list[str]:
    """Where kappa falls in plain training."""
    if not falls:
        return ["No plain run generalises, so there is no fall of kappa to place."]
    before, during, confidence = (
        fmean(each[key] for each in falls) for key in ("before", "during", "confidence")
    )
    text = (
        f"In plain training kappa falls by {before:.1f} powers of ten between its highest value and the first epoch "
        f"with validation accuracy above {SETS_IN:g}, and by {during:.1f} more while generalisation sets in (mean of "
        f"{len(falls)} seeds). "
    )
    if before > 0.5:
        text += (
            f"So much of the fall comes before generalisation, when mean confidence rises to {confidence:.4f}: kappa "
            "of confident answers is small, whether they generalise or not."
        )
    return [text.strip()]


def table(onsets: Mapping[str, Sequence[Onset | None]], epochs: int, plan: Plan) -> Table:
    """When each arm knows the training data by heart, and when it generalises."""
    body = []
    for title, each in onsets.items():
        there = [found for found in each if found is not None]
        memorised = ", ".join("never" if found.memorised is None else str(found.memorised) for found in there)
        body.append(
            (
                title,
                memorised,
                when(each, epochs).removeprefix("epoch "),
                ", ".join(f"{found.validation:.3f}" for found in there),
                ", ".join(f"{found.kappa:.3g}" for found in there),
            )
        )
    return Table(
        "When generalisation sets in",
        (
            "arm",
            "memorised, epoch",
            "generalises, epoch",
            "validation accuracy at the end",
            "kappa at the end",
        ),
        tuple(body),
        f"One number a seed ({', '.join(map(str, plan.seeds))}). Memorised: training accuracy stays above "
        f"{MEMORISED:g}; generalises: validation accuracy stays above {GENERALISED:g}. Strength {plan.strength:g} "
        f"with either sign, temperature {KNOBS['temperature']:g}, unit features; away from flat with ||W|| "
        f"of at most {plan.cap:g}; removed after {plan.remove_after} steps.",
    )


def scaled(plan: Plan, scale: Scale) -> list[str]:
    """What differs from the paper."""
    config = plan.config(plan.arms[0], plan.seeds[0])
    found = [
        "Strength, cap, removal and number of epochs are ours. They were set in a trial on seed 0, one of the seeds "
        "here, so that the arms differ visibly; they say nothing about a best value. Without unit features and "
        "a cap, a negative strength of 1e-4 already kept that network from fitting the training sums.",
        "Validation pairs are watched after every epoch; the test pairs are never used.",
    ]
    if scale == "small":
        found.append(
            f"{config.epochs} epochs of batches of {config.batch_size}, {len(plan.seeds)} seeds; a network and a "
            "modulus that generalise within minutes on one core."
        )
    return found


EXPERIMENT = Experiment(
    name="grokking",
    summary="modular addition, trained towards and away from flat minima",
    paper="Han et al. 2025 (arXiv 2509.17738): relative flatness falls when generalisation sets in; a negative "
    "strength delays generalisation, and removing it restores it.",
    run=run,
)
