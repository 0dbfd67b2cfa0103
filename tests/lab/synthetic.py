"""Finished trials with numbers made up, so that reports can be tested without training."""

from collections.abc import Sequence
from typing import Any

from relflat.lab.compare import Comparison, Plan, choose, judge
from relflat.lab.timing import StepCost
from relflat.lab.trials import Trial

GRIDS: dict[str, list[dict[str, Any]]] = {
    "plain": [{"weight_decay": 0.0}, {"weight_decay": 0.01}],
    "sam": [{"rho": 0.1}, {"rho": 0.4}],
    "fam": [{"strength": 0.1}, {"strength": 1.0, "radius": 0.5}],
}
PLAN = Plan("digits", {"label_noise": 0.2, "epochs": 2}, GRIDS, (100,), (0, 1, 2))
COSTS = {
    "plain": StepCost(0.001, 1.0, 1.0, 1.0),
    "sam": StepCost(0.002, 2.0, 1.9, 2.1),
    "fam": StepCost(0.0012, 1.2, 1.1, 1.3),
}


def trial(
    method: str, seed: int, accuracy: float, kappa: float, *, diverged: bool = False, **settings: Any
) -> Trial:
    """A trial with this accuracy on every split."""
    split = None if diverged else {"accuracy": accuracy, "loss": 1 - accuracy}
    result = {
        "status": "diverged" if diverged else "finished",
        "reason": "nan" if diverged else None,
        "label_noise_changed": 0.18,
        "train": split,
        "validation": split,
        "test": split,
        "flatness": None if diverged else {"value": kappa, "confidence": 0.9, "weight_norm": 3.0},
    }
    record = {"validation_accuracy": accuracy, "train_accuracy": accuracy, "kappa": kappa}
    return Trial(PLAN.config(method, settings, seed), result, [] if diverged else [record, record])


def comparison(scores: dict[str, Sequence[float]], *, lost: tuple[str, int] | None = None) -> Comparison:
    """A comparison whose tested runs have these accuracies; ``lost`` names a run that diverged."""
    candidates = [
        judge(method, settings, [trial(method, 100, 0.8 + 0.1 * place, 5.0 + place, **settings)])
        for method, grid in GRIDS.items()
        for place, settings in enumerate(grid)
    ]
    chosen = {method: choose(candidates, method) for method in GRIDS}
    finals = {
        method: [
            trial(method, seed, score, 3.0 + seed, diverged=(method, seed) == lost, **chosen[method].settings)
            for seed, score in enumerate(values)
        ]
        for method, values in scores.items()
    }
    return Comparison(PLAN, candidates, chosen, finals)
