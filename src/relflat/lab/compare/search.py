"""A fair comparison: settings are chosen on validation data, then run on fresh seeds and tested once.

Every arm gets the same number of trials, and a few more where the best lies at the end of what was tried. Runs are
kept by the hash of their configuration, so a comparison that was interrupted goes on where it stopped.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from relflat.errors import ConfigError
from relflat.lab.compare.arms import Arm, Values
from relflat.lab.compare.trials import Job, OnTrial, Trial, attempt, each
from relflat.lab.tasks.catalogue import task_named
from relflat.lab.tasks.metrics import ACCURACY
from relflat.lab.train.config import RunConfig, make

RECIPE = "recipe"
Do = Callable[[Sequence[Job]], Sequence[Trial | str]]  # does runs or reads them; gives the reason where it cannot


@dataclass(frozen=True)
class Plan:
    """What is compared."""

    task: str
    common: Values  # that all runs share
    arms: tuple[Arm, ...]  # the first is the one the others are held against
    search_seeds: tuple[int, ...]  # of the trials that settings are chosen by
    seeds: tuple[int, ...]  # fresh ones, of the runs that are tested
    beyond: int = 0  # most settings past the end of an arm's grid
    also_untuned: bool = False  # every arm at its usual setting, as a second table
    recipe: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # values to choose of, for all arms: none first
    recipe_seeds: tuple[int, ...] = ()  # of the trials that they are chosen by
    in_recipe: tuple[str, ...] = ()  # arms that were asked for, but are part of the recipe

    def __post_init__(self) -> None:
        sizes = {arm.name: len(arm.values) for arm in self.arms}
        if len(sizes) < 2 or len(sizes) < len(self.arms):
            raise ConfigError(f"A comparison needs two arms or more of different names, but got {list(sizes)}.")
        if len(set(sizes.values()) - {0}) > 1:
            raise ConfigError(f"Every arm needs the same number of settings to try, but got {sizes}.")
        if not self.seeds or (self.untuned and max(sizes.values()) > 1):
            raise ConfigError("A comparison needs at least one seed to choose by and one to test; raise --seeds.")
        both = sorted({*self.search_seeds, *self.recipe_seeds} & set(self.seeds))
        if both:
            raise ConfigError(f"Seeds {both} are used for choosing and for testing; make them different.")

    @property
    def untuned(self) -> bool:
        """Whether nothing is searched."""
        return not self.search_seeds

    @property
    def usual(self) -> "Plan":
        """The same without a search; of arms that are the same then, the first."""
        arms = [replace(arm, values=()) for arm in reversed(self.arms)]
        own = {self.config(arm, arm.grid[0], 0).digest: arm for arm in arms}
        return replace(self, arms=tuple(reversed(own.values())), search_seeds=(), also_untuned=False)

    @property
    def runs(self) -> int:
        """How many runs it takes at most."""
        tried = sum(len(arm.values) + self.beyond * (len(arm.values) > 2) for arm in self.arms)
        tested = len(self.arms) + (len(self.usual.arms) if self.also_untuned else 0)
        chosen = sum(map(len, self.recipe.values())) * len(self.recipe_seeds)
        return tried * len(self.search_seeds) + tested * len(self.seeds) + chosen

    def config(self, arm: Arm, settings: Values, seed: int) -> RunConfig:
        """The configuration of one run."""
        return make({"task": self.task, **self.common, "algorithm": arm.algorithm, **settings, "seed": seed})

    def job(self, runs: Path, arm: Arm, settings: Values, seed: int, *, test: bool = False) -> Job:
        """One run; the test split is evaluated only where that is asked for."""
        return Job(self.config(arm, settings, seed), runs, test, arm.name)

    def searching(self, runs: Path, tried: Mapping[str, Sequence[Values]]) -> list[Job]:
        """These settings of arms, by name, on the search seeds."""
        pairs = [(arm, settings) for arm in self.arms for settings in tried.get(arm.name, ())]
        return [self.job(runs, *pair, seed) for pair in pairs for seed in self.search_seeds]


def plan_from(values: Mapping[str, Any]) -> Plan:
    """Build a plan from what ``asdict`` made of one, also after a round trip through JSON or by an older version."""
    known = {each.name: values[each.name] for each in fields(Plan) if each.name in values}
    seeds = {key: tuple(value) for key, value in known.items() if isinstance(value, list)}
    return Plan(**{**known, **seeds, "arms": tuple(Arm(**arm) for arm in values["arms"])})


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
    recipe: Sequence[Candidate] = ()  # what was tried to put under all arms; the best is in the plan's values
    untuned: "Comparison | None" = None  # the second table

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
    """Recipe and search first, then the tested runs of what was chosen, without arms that are said to fail."""
    reasons = dict(failed)
    recipe = choose_recipe(plan, runs, do)
    if recipe:
        without = {key: values[0] for key, values in plan.recipe.items()}
        plan = replace(plan, common={**plan.common, **without, **choose(recipe, RECIPE).settings})
    candidates = search(plan, runs, do, reasons)
    tuned = tested(plan, runs, do, reasons, candidates)
    untuned = (
        tested(plan.usual, runs, do, reasons, search(plan.usual, runs, do, reasons)) if plan.also_untuned else None
    )
    return replace(tuned, failed=reasons, recipe=recipe, untuned=untuned)


def tested(plan: Plan, runs: Path, do: Do, reasons: dict[str, str], candidates: Sequence[Candidate]) -> Comparison:
    """One table: the runs of each arm's best setting."""
    chosen = {arm.name: choose(candidates, arm.name) for arm in plan.arms if arm.name not in reasons}
    pairs = [(arm, chosen[arm.name].settings) for arm in plan.arms if arm.name in chosen]
    jobs = [plan.job(runs, *pair, seed, test=True) for seed in plan.seeds for pair in pairs]
    finals = by_arm(jobs, do, reasons)
    if not finals:
        raise ConfigError(f"No arm can run on this task. {next(iter(reasons.values()))}")
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
    return {name: trials for name, trials in found.items() if name not in failed}


def choose_recipe(plan: Plan, runs: Path, do: Do) -> list[Candidate]:
    """What was tried by plain alone, one part of the recipe after the other, each with what did best before."""
    arm, found, best = Arm(RECIPE, RECIPE, "plain", "", ()), list[Candidate](), dict[str, Any]()
    for key, values in plan.recipe.items():
        tried = [{**best, key: value} for value in values[bool(found) :]]
        failed: dict[str, str] = {}
        jobs = [plan.job(runs, arm, each, seed) for each in tried for seed in plan.recipe_seeds]
        trials = by_arm(jobs, do, failed)
        if failed:
            raise ConfigError(f"No recipe with {key}: {failed[RECIPE]} Give --{key.replace('_', '-')} a value.")
        found += judged(plan, RECIPE, tried, trials[RECIPE])
        best = dict(choose(found, RECIPE).settings)
    return found


def search(plan: Plan, runs: Path, do: Do, reasons: dict[str, str]) -> list[Candidate]:
    """Each arm's grid, then step by step past an end that did best; a usual setting where nothing is searched."""
    arms = {arm.name: arm for arm in plan.arms if arm.name not in reasons}
    found: dict[str, list[Candidate]] = {name: [] for name in arms}
    tried = {name: arm.grid for name, arm in arms.items() if arm.values}
    for _ in range(1 + plan.beyond):
        for name, own in by_arm(plan.searching(runs, tried), do, reasons).items():
            found[name] += judged(plan, name, tried[name], own)
        tried = {name: further(arms[name], own) for name, own in found.items()}
    return [each for name, own in found.items() if name not in reasons for each in in_order(arms[name], own)]


def further(arm: Arm, own: Sequence[Candidate]) -> list[Values]:
    """The setting past the end of what was tried, where that end did best."""
    if not own or (best := choose(own, arm.name)).diverged:
        return []
    value = arm.beyond([each.settings[arm.key] for each in own], best.settings[arm.key])
    return [] if value is None else [value]


def in_order(arm: Arm, own: Sequence[Candidate]) -> list[Candidate]:
    """The settings of an arm as its grid goes, those past its ends too; the usual one where none was tried."""
    if not own:
        return [Candidate(arm.name, arm.grid[0], math.nan, math.nan, 0, ())]
    return sorted(own, key=lambda each: each.settings[arm.key], reverse=arm.values[0] > arm.values[-1])


def judged(plan: Plan, arm: str, tried: Sequence[Values], trials: Sequence[Trial]) -> list[Candidate]:
    """Settings of an arm, given their trials, setting by setting."""
    metric, size = task_named(plan.task).metric.name, len(trials) // max(1, len(tried))
    parts = [trials[start : start + size] for start in range(0, len(trials), size)] if tried else []
    return [judge(arm, settings, part, metric) for settings, part in zip(tried, parts, strict=True)]


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
