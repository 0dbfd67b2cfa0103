"""What the experiments with trainings share: runs of several arms over seeds, done once and grouped by arm."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from relflat.lab.compare.trials import Job, Trial, each, run_job, workers
from relflat.lab.train.config import RunConfig, make
from relflat.papers.experiment import Context

Arm = TypeVar("Arm", bound=Hashable)


@dataclass(frozen=True)
class Size:
    """What is trained at one scale."""

    seeds: tuple[int, ...]  # of the runs that are reported
    common: Mapping[str, Any]  # values that all runs share; a task with ``.py:`` is one of a file beside this one

    def config(self, seed: int, **own: Any) -> RunConfig:
        """The run of a seed with values of its own."""
        task = self.common["task"]
        if ".py:" in task:
            task = str(Path(__file__).resolve().parent / task)
        return make({**self.common, "task": task, "seed": seed, **own})


def train_all(
    context: Context, places: Sequence[tuple[Arm, RunConfig]], *, test: bool = True, what: str = "trainings"
) -> dict[Arm, list[Trial]]:
    """Do the runs that were not done before; all of them by arm, in the order given.

    Places are to be given seed by seed, so that an interrupted study has whole seeds; ``test``: runs may see the test
    split.
    """
    jobs = [Job(config, context.runs, test) for _, config in places]
    with workers(context.workers) as pool:
        trials = each(pool, run_job, jobs, context.counter(what, len(jobs)))
    found: dict[Arm, list[Trial]] = {arm: [] for arm, _ in places}
    for (arm, _), trial in zip(places, trials, strict=True):
        found[arm].append(trial)
    return found


def finished(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Results of the runs that did not diverge."""
    return [trial.result for trial in trials if trial.finished]


def numbers(trials: Sequence[Trial], part: str, key: str) -> list[float]:
    """One number of each run that did not diverge."""
    return [result[part][key] for result in finished(trials)]
