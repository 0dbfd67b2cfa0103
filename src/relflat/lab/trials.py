"""Running many configurations on local worker processes, one thread each."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from relflat.lab.config import RunConfig
from relflat.lab.store import folder_of, metrics_of
from relflat.lab.training import train


@dataclass(frozen=True)
class Trial:
    """A finished run.

    Attributes:
        config: what ran.
        result: its ``result.json``.
        history: its ``metrics.jsonl``.
    """

    config: RunConfig
    result: dict[str, Any]
    history: list[dict[str, Any]]

    @property
    def finished(self) -> bool:
        """False when training diverged."""
        return bool(self.result["status"] == "finished")


@dataclass(frozen=True)
class Job:
    """One run to do: its configuration, where runs are kept, and whether it may see the test split."""

    config: RunConfig
    runs: Path
    test: bool


def one_thread() -> None:
    """Start a worker: several processes share the machine, so each computes on one thread."""
    torch.set_num_threads(1)


def run_job(job: Job) -> Trial:
    """Do one run from the start and return what it left behind."""
    folder = folder_of(job.config, job.runs)
    result = train(job.config, folder, test=job.test, tensorboard=False)
    return Trial(job.config, result, metrics_of(folder))


def run_all(
    pool: ProcessPoolExecutor, jobs: Sequence[Job], on_done: Callable[[Trial], None] = lambda trial: None
) -> list[Trial]:
    """Do all runs and return them in the order of the jobs; the first error stops the rest."""
    futures = {pool.submit(run_job, job): place for place, job in enumerate(jobs)}
    trials: dict[int, Trial] = {}
    try:
        for future in as_completed(futures):
            trials[futures[future]] = future.result()
            on_done(trials[futures[future]])
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    return [trials[place] for place in range(len(jobs))]


def workers(count: int) -> ProcessPoolExecutor:
    """A pool of fresh single-thread processes."""
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"), initializer=one_thread)
