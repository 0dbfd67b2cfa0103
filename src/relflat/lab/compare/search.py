"""A fair comparison: settings are chosen on validation data, then run on fresh seeds and tested once.

Every arm gets the same number of trials. Runs are kept by the hash of their configuration, so a comparison
that was interrupted goes on where it stopped.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from relflat.errors import ConfigError
from relflat.lab.compare.arms import Arm, Values
from relflat.lab.compare.trials import Job, OnTrial, Trial, attempt, each
from relflat.lab.tasks.catalogue import task_named
from relflat.lab.tasks.metrics import ACCURACY
from relflat.lab.train.config import RunConfig, make

Do = Callable[[Sequence[Job]], Sequence[Trial | str]]  # does runs or reads them; gives the reason where it cannot


@dataclass(frozen=True)
class Plan:
    """What is compared."""

    task: str
    common: Values  # that all runs share
    arms: tuple[Arm, ...]  # the first is the one the others are held against
    search_seeds: tuple[int, ...]  # of the trials that settings are chosen by
    seeds: tuple[int, ...]  # fresh ones, of the runs that are tested

    def __post_init__(self) -> None:
        sizes = {arm.name: len(arm.values) for arm in self.arms}
        if len(sizes) < 2 or len(sizes) < len(self.arms):
            raise ConfigError(f"A comparison needs two arms or more of different names, but got {list(sizes)}.")
        if len(set(sizes.values())) > 1:
            raise ConfigError(f"Every arm needs the same number of settings to try, but got {sizes}.")
        if not self.seeds or (self.untuned and max(sizes.values()) > 1):
            raise ConfigError("A comparison needs at least one seed to choose by and one to test; raise --seeds.")
        both = sorted(set(self.search_seeds) & set(self.seeds))
        if both:
            raise ConfigError(f"Seeds {both} are used for choosing and for testing; make them different.")

    @property
    def untuned(self) -> bool:
        """Whether nothing is searched."""
        return not self.search_seeds

    @property
    def runs(self) -> int:
        """How many runs it takes."""
        return sum(len(arm.values) * len(self.search_seeds) + len(self.seeds) for arm in self.arms)

    def config(self, arm: Arm, settings: Values, seed: int) -> RunConfig:
        """The configuration of one run."""
        return make({"task": self.task, **self.common, "algorithm": arm.algorithm, **settings, "seed": seed})

    def searching(self, runs: Path, arms: Iterable[Arm]) -> list[Job]:
        """Every setting of these arms on the search seeds; the test split is not evaluated."""
        tried = ((arm, *rest) for arm in arms for rest in product(arm.grid, self.search_seeds))
        return [Job(self.config(*each), runs, False, each[0].name) for each in tried]

    def testing(self, runs: Path, chosen: Sequence[tuple[Arm, Values]]) -> list[Job]:
        """One setting an arm on the fresh seeds, seed by seed."""
        return [Job(self.config(*each, seed), runs, True, each[0].name) for seed in self.seeds for each in chosen]

    def flat(self) -> dict[str, Any]:
        """As plain values; ``plan_from`` turns them back into the plan."""
        return asdict(self)


def plan_from(values: Mapping[str, Any]) -> Plan:
    """Build a plan from what ``Plan.flat`` gave, also after a round trip through JSON."""
    arms = tuple(Arm(**arm) for arm in values["arms"])
    return Plan(values["task"], values["common"], arms, tuple(values["search_seeds"]), tuple(values["seeds"]))


@dataclass(frozen=True)
class Candidate:
    """One setting of one arm and how it did on validation data."""

    arm: str
    settings: Values
    score: float  # mean of the task's metric over the search seeds; -infinite if any trial diverged
    loss: float  # mean over the search seeds; infinite if any trial diverged
    diverged: int  # number of trials that diverged
    trials: Sequence[Trial]


@dataclass(frozen=True)
class Comparison:
    """What came out: all settings tried, and by each arm's name the best one and its tested runs, seed by seed."""

    plan: Plan
    candidates: Sequence[Candidate]
    chosen: Mapping[str, Candidate]
    finals: Mapping[str, Sequence[Trial]]
    failed: Mapping[str, str] = field(default_factory=dict)  # arms that cannot run on the task, and why

    @property
    def arms(self) -> list[Arm]:
        """Those that ran; the others are held against the first of them."""
        return [arm for arm in self.plan.arms if arm.name not in self.failed]


def compare(plan: Plan, runs: Path, pool: Executor, on_trial: OnTrial) -> Comparison:
    """Search on validation data, then test the chosen settings once on the fresh seeds; some arm must be able to."""

    def note(found: Trial | str) -> object:
        return isinstance(found, Trial) and on_trial(found)

    return conclude(plan, runs, lambda jobs: each(pool, attempt, jobs, note), {})


def conclude(plan: Plan, runs: Path, do: Do, failed: Mapping[str, str]) -> Comparison:
    """All trials of the search first, then the tested runs of what was chosen, without arms that are said to fail."""
    reasons = dict(failed)
    arms = {arm.name: arm for arm in plan.arms if arm.name not in failed}
    jobs = plan.searching(runs, arms.values())
    searched = by_arm(jobs, do, reasons) if jobs else {name: [] for name in arms}
    candidates = [found for name, trials in searched.items() for found in judged(plan, arms[name], trials)]
    chosen = {name: choose(candidates, name) for name in searched}
    finals = by_arm(plan.testing(runs, [(arms[name], chosen[name].settings) for name in chosen]), do, reasons)
    kept = [found for found in candidates if found.arm in finals]
    return Comparison(plan, kept, {name: chosen[name] for name in finals}, finals, reasons)


def by_arm(jobs: Sequence[Job], do: Do, failed: dict[str, str]) -> dict[str, list[Trial]]:
    """The trials of each arm, in the order of the jobs; arms that cannot do theirs are added to ``failed``."""
    found: dict[str, list[Trial]] = {job.arm: [] for job in jobs}
    for job, trial in zip(jobs, do(jobs), strict=True):
        if isinstance(trial, Trial):
            found[job.arm].append(trial)
        else:
            failed.setdefault(job.arm, trial)
    done = {name: trials for name, trials in found.items() if name not in failed}
    if not done:
        raise ConfigError(f"No arm can run on this task. {next(iter(failed.values()))}")
    return done


def judged(plan: Plan, arm: Arm, trials: Sequence[Trial]) -> list[Candidate]:
    """The settings of an arm, given its trials, setting by setting."""
    if plan.untuned:
        return [Candidate(arm.name, arm.grid[0], math.nan, math.nan, 0, ())]
    metric, size = task_named(plan.task).metric.name, len(plan.search_seeds)
    parts = [trials[start : start + size] for start in range(0, len(trials), size)]
    return [judge(arm.name, settings, part, metric) for settings, part in zip(arm.grid, parts, strict=True)]


def judge(arm: str, settings: Values, trials: Sequence[Trial], metric: str = ACCURACY.name) -> Candidate:
    """Score one setting by its validation results."""
    diverged = sum(not trial.finished for trial in trials)
    if diverged:
        return Candidate(arm, settings, -math.inf, math.inf, diverged, trials)
    score, loss = (fmean(trial.result["validation"][key] for trial in trials) for key in (metric, "loss"))
    return Candidate(arm, settings, score, loss, 0, trials)


def choose(candidates: Sequence[Candidate], arm: str) -> Candidate:
    """The setting with the best validation score; of equal ones the one with the lower loss."""
    own = [candidate for candidate in candidates if candidate.arm == arm]
    return max(own, key=lambda candidate: (candidate.score, -candidate.loss))
