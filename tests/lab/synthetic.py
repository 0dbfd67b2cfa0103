"""Finished trials with numbers made up, so that reports can be tested without training."""

from collections.abc import Sequence
from typing import Any

from relflat.lab.compare.arms import Arm
from relflat.lab.compare.search import Comparison, Plan, choose, judge
from relflat.lab.compare.trials import Trial
from relflat.lab.train.timing import StepCost

ARMS = (
    Arm("plain", "plain", "plain", "weight_decay", (0.0, 0.01), origin="nowhere"),
    Arm("sam", "SAM", "sam", "rho", (0.1, 0.4)),
    Arm("fam-radius", "FAM radius", "fam", "radius", (0.1, 0.5), fixed={"strength": 1.0}),
)
PLAN = Plan("digits", {"label_noise": 0.2, "epochs": 2}, ARMS, (100,), (0, 1, 2))
COSTS = {
    "plain": StepCost(0.001, 1.0, 1.0, 1.0),
    "sam": StepCost(0.002, 2.0, 1.9, 2.1),
    "fam-radius": StepCost(0.0012, 1.05, 1.0, 1.1),
}


def trial(arm: Arm, seed: int, accuracy: float, kappa: float, *, diverged: bool = False, **settings: Any) -> Trial:
    """A trial with this accuracy on every split."""
    split = {
        "accuracy": accuracy,
        "loss": 1 - accuracy,
        "ece": 0.05,
        "bins": [[0.5, 0.4, 0.5], [0.5, 0.95, accuracy]],
    }
    result = {
        "status": "diverged" if diverged else "finished",
        "reason": "nan" if diverged else None,
        "label_noise_changed": 0.18,
        "train": None if diverged else split,
        "validation": None if diverged else split,
        "test": None if diverged else split,
        "kappa_before": 2.5,
        "flatness": None if diverged else {"value": kappa, "confidence": 0.9, "weight_norm": 3.0},
    }
    history = [
        {
            "epoch": epoch,
            "steps": 28 * epoch,
            "validation_accuracy": accuracy - 0.1 * (2 - epoch),
            "train_accuracy": accuracy,
            "kappa": kappa,
        }
        for epoch in (1, 2)
    ]
    config = PLAN.config(arm, settings or arm.grid[0], seed)
    return Trial(config, result, [] if diverged else history)


def comparison(
    scores: Sequence[Sequence[float]], *, lost: Sequence[tuple[int, int]] = (), unsearched: bool = False
) -> Comparison:
    """A comparison of ``ARMS`` whose tested runs have these accuracies.

    Args:
        scores: a row an arm.
        lost: (arm, seed) of those that diverged.
        unsearched: all trials of the search diverged.
    """
    candidates = [
        judge(arm.name, settings, [trial(arm, 100, 0.8 + 0.1 * place, 5.0 + place, diverged=unsearched, **settings)])
        for arm in ARMS
        for place, settings in enumerate(arm.grid)
    ]
    chosen = {arm.name: choose(candidates, arm.name) for arm in ARMS}
    finals = {
        arm.name: [
            trial(arm, seed, score, 3.0 + seed, diverged=(place, seed) in lost, **chosen[arm.name].settings)
            for seed, score in enumerate(values)
        ]
        for place, (arm, values) in enumerate(zip(ARMS, scores, strict=True))
    }
    plan = Plan(PLAN.task, PLAN.common, ARMS, PLAN.search_seeds, tuple(range(len(scores[0]))))
    return Comparison(plan, candidates, chosen, finals)
