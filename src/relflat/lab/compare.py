"""A fair comparison: settings are chosen on validation data, then run on fresh seeds and tested once.

Every method gets the same number of trials.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from relflat.errors import ConfigError
from relflat.lab.config import RunConfig, make
from relflat.lab.trials import Job, Trial, run_all

Values = Mapping[str, Any]
OnTrial = Callable[[Trial], None]


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        task: name of the task.
        common: values that all runs share.
        grids: for each method the settings to try.
        search_seeds: seeds of the trials that settings are chosen by.
        seeds: fresh seeds of the runs that are tested.
    """

    task: str
    common: Values
    grids: Mapping[str, Sequence[Values]]
    search_seeds: Sequence[int]
    seeds: Sequence[int]

    def __post_init__(self) -> None:
        sizes = {method: len(grid) for method, grid in self.grids.items()}
        if len(set(sizes.values())) > 1:
            raise ConfigError(f"Every method needs the same number of settings to try, but got {sizes}.")
        both = sorted(set(self.search_seeds) & set(self.seeds))
        if both:
            raise ConfigError(f"Seeds {both} are used for choosing and for testing; make them different.")

    def config(self, method: str, settings: Values, seed: int) -> RunConfig:
        """The configuration of one run."""
        return make({"task": self.task, **self.common, "method": method, **settings, "seed": seed})


@dataclass(frozen=True)
class Candidate:
    """One setting of one method and how it did on validation data.

    Attributes:
        method: name of the method.
        settings: what was tried.
        accuracy: mean validation accuracy over the search seeds; 0 if any trial diverged.
        loss: mean validation loss; infinite if any trial diverged.
        diverged: number of trials that diverged.
        trials: the runs.
    """

    method: str
    settings: Values
    accuracy: float
    loss: float
    diverged: int
    trials: Sequence[Trial]


@dataclass(frozen=True)
class Comparison:
    """What came out.

    Attributes:
        plan: what was compared.
        candidates: all settings that were tried.
        chosen: for each method the best setting on validation data.
        finals: for each method the tested runs, in the order of ``plan.seeds``.
    """

    plan: Plan
    candidates: Sequence[Candidate]
    chosen: Mapping[str, Candidate]
    finals: Mapping[str, Sequence[Trial]]


def compare(plan: Plan, runs: Path, pool: ProcessPoolExecutor, on_trial: OnTrial) -> Comparison:
    """Search on validation data, then test the chosen settings once on the fresh seeds.

    Args:
        plan: what to compare.
        runs: folder that keeps the runs.
        pool: workers.
        on_trial: called after each run.
    """
    candidates = search(plan, runs, pool, on_trial)
    chosen = {method: choose(candidates, method) for method in plan.grids}
    jobs = [
        Job(plan.config(method, candidate.settings, seed), runs, test=True)
        for seed in plan.seeds
        for method, candidate in chosen.items()
    ]
    trials = run_all(pool, jobs, on_trial)
    finals = {method: [trial for trial in trials if trial.config.method == method] for method in chosen}
    return Comparison(plan, candidates, chosen, finals)


def search(plan: Plan, runs: Path, pool: ProcessPoolExecutor, on_trial: OnTrial) -> list[Candidate]:
    """Try every setting on the search seeds; the test split is not evaluated."""
    pairs = [(method, settings) for method, grid in plan.grids.items() for settings in grid]
    jobs = [
        Job(plan.config(method, settings, seed), runs, test=False)
        for method, settings in pairs
        for seed in plan.search_seeds
    ]
    trials = run_all(pool, jobs, on_trial)
    per_setting = len(plan.search_seeds)
    return [
        judge(method, settings, trials[place * per_setting : (place + 1) * per_setting])
        for place, (method, settings) in enumerate(pairs)
    ]


def judge(method: str, settings: Values, trials: Sequence[Trial]) -> Candidate:
    """Score one setting by its validation results."""
    diverged = sum(not trial.finished for trial in trials)
    if diverged:
        return Candidate(method, settings, 0.0, float("inf"), diverged, trials)
    accuracy = fmean(trial.result["validation"]["accuracy"] for trial in trials)
    loss = fmean(trial.result["validation"]["loss"] for trial in trials)
    return Candidate(method, settings, accuracy, loss, 0, trials)


def choose(candidates: Sequence[Candidate], method: str) -> Candidate:
    """The setting with the best validation accuracy; of equal ones the one with the lower loss."""
    own = [candidate for candidate in candidates if candidate.method == method]
    return max(own, key=lambda candidate: (candidate.accuracy, -candidate.loss))
