"""A comparison on disk: its plan, its step costs, and the report in all its forms.

relflat-report.lock   marks the folder as a report's
plan.json          what is compared, and which folder keeps the runs
costs.json         seconds a step
failed.json        arms that cannot run on the task, and why
environment.json   where it ran
report.html, report.md, report.csv, report.tex, report.json; an SVG file for each figure of report.md
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from relflat.errors import ConfigError, DataError
from relflat.lab.compare.search import Comparison, Plan, compare, conclude, plan_from
from relflat.lab.compare.trials import Job, OnTrial, Trial, one_thread, read_trial, workers
from relflat.lab.report import report
from relflat.lab.report.summary import Summary
from relflat.lab.report.verdict import judgement
from relflat.lab.tasks import own
from relflat.lab.tasks.catalogue import full_name, short_name, source_of
from relflat.lab.train import store
from relflat.lab.train.config import require_unchanged
from relflat.lab.train.environment import describe
from relflat.lab.train.timing import StepCost, step_costs

PLAN, COSTS, ENVIRONMENT, REPORT = "plan.json", "costs.json", "environment.json", "report.json"
FAILED = "failed.json"
REQUIRED = {"task", "arms", "search_seeds"}  # in PLAN
WRITTEN = r"(?:plan|costs|failed|environment)\.json|report\.\w+|[a-z0-9-]+\.svg"


def folder_for(plan: Plan, runs: Path) -> Path:
    """Where the report of a comparison goes by default: a name made of its task and a hash of the plan."""
    text = json.dumps({**asdict(plan), "source": source_of(plan.task)}, sort_keys=True)
    return runs / f"compare-{short_name(plan.task)}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def open_study(folder: Path, plan: Plan, runs: Path, notes: str) -> None:
    """Write the plan of a comparison, or see that the folder holds the same one."""
    values = {**asdict(plan), "source": source_of(plan.task), "notes": notes, "runs": os.path.relpath(runs, folder)}
    store.require_ours(folder, store.REPORT_MARK, PLAN, REQUIRED, "a report's folder; choose another --out")
    if (folder / PLAN).is_file():
        old, new = store.read_json(folder / PLAN), store.as_json(values)
        keys = [key for key in new if key != "notes" and old.get(key) != new[key]]
        if keys == ["source"]:
            require_unchanged(plan.task, old["source"], f"the comparison in {folder} was begun. Choose another --out")
        if keys:
            raise ConfigError(
                f"{folder} holds a comparison with other values of {', '.join(keys)}. Choose another --out."
            )
    with store.writing(folder, "--runs" if folder.parent == runs else "--out"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / store.REPORT_MARK).touch()
        store.remove_unfinished(folder, WRITTEN)
        if not (folder / PLAN).is_file():
            store.write_json(folder / PLAN, values)


def carry_out(folder: Path, plan: Plan, runs: Path, engine: int | Executor, on_trial: OnTrial) -> Summary:
    """Do the runs that are missing, time the steps, and write the report.

    The engine is shut down afterwards; a number stands for so many processes of this machine.
    """
    with workers(engine) if isinstance(engine, int) else engine as pool:
        comparison = compare(plan, runs.absolute(), pool, on_trial)
    with store.writing(folder, "--out"):
        if comparison.failed != failed_of(folder):  # other arms are timed
            (folder / COSTS).unlink(missing_ok=True)
        store.write_json(folder / FAILED, comparison.failed)
    with own.blamed(plan.task):
        found = Summary(comparison, costs_of(folder, comparison))
    with store.writing(folder, "--out"):
        if not (folder / ENVIRONMENT).is_file():
            store.write_json(folder / ENVIRONMENT, describe())
    write_report(folder, found)
    return found


def failed_of(folder: Path) -> dict[str, Any]:
    """Arms of a comparison that could not run, and why."""
    return store.read_json(folder / FAILED) if (folder / FAILED).is_file() else {}


def costs_of(folder: Path, comparison: Comparison) -> dict[str, StepCost]:
    """Seconds a step of each arm's chosen setting: those that were kept, else measured now and kept."""
    plan, chosen, arms = comparison.plan, comparison.chosen, comparison.arms
    if (folder / COSTS).is_file():
        try:
            kept = store.read_json(folder / COSTS)
            return {arm.name: StepCost(**kept[arm.name]) for arm in arms}
        except (KeyError, TypeError) as error:
            raise store.damaged(folder / COSTS, f"{type(error).__name__}: {error}") from error
    configs = [plan.config(arm, chosen[arm.name].settings, plan.seeds[0]) for arm in arms]
    with one_thread():
        costs = dict(zip((arm.name for arm in arms), step_costs(configs), strict=True))
    with store.writing(folder, "--out"):
        store.write_json(folder / COSTS, {name: asdict(cost) for name, cost in costs.items()})
    return costs


def write_report(folder: Path, found: Summary) -> None:
    """Write the report in all its forms."""
    environment = store.read_json(folder / ENVIRONMENT)
    files = report.files(found, environment, str(store.read_json(folder / PLAN)["notes"]))
    with store.writing(folder, "--out"):
        for name, text in files.items():
            store.write_text(folder / name, text)
        store.write_json(folder / REPORT, {**numbers(found), "environment": environment})


def numbers(found: Summary) -> dict[str, Any]:
    """The numbers behind the report."""
    comparison = found.comparison
    return {
        "plan": asdict(comparison.plan),
        "failed": dict(comparison.failed),
        "arms": [asdict(line) for line in found.rows],
        "differences": [asdict(pair) for pair in found.differences],
        "verdict": judgement(found),  # without times, which are with the arms
        "untuned": None if found.untuned is None else numbers(found.untuned),
        "search": [
            {
                "arm": candidate.arm,
                "settings": dict(candidate.settings),
                f"validation_{found.metric.name}": candidate.score,
                "validation_loss": candidate.loss,
                "diverged": candidate.diverged,
                "chosen": candidate is comparison.chosen.get(candidate.arm),
            }
            for candidate in (*comparison.recipe, *comparison.candidates)
        ],
        "tested": {
            name: [
                {"seed": trial.config.seed, "test": trial.result["test"], "corrupted": trial.result.get("corrupted")}
                for trial in trials
            ]
            for name, trials in comparison.finals.items()
        },
    }


def rebuild(folder: Path, task: str | None = None) -> Summary:
    """Write the report of a finished comparison again, from its runs; nothing is trained.

    A task file that only the comparison names is not imported; whoever trusts it gives it as ``task``.
    """
    missing = [name for name in (PLAN, COSTS, ENVIRONMENT) if not (folder / name).is_file()]
    if PLAN in missing:
        raise DataError(
            f"{folder} is not a comparison: it has no {PLAN}. Make one with: relflat compare TASK --out {folder}"
        )
    values = store.read_json(folder / PLAN)
    if missing:
        raise DataError(
            f"The comparison in {folder} is not finished: {', '.join(missing)} is missing. "
            "Give its relflat compare command again; it goes on where it stopped."
        )
    try:
        plan = plan_from(values)
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{folder / PLAN} is damaged or of another version ({type(error).__name__}: {error})."
            f"{store.written_by(folder)} Give its relflat compare command again with another --out."
        ) from error
    if task is None:
        own.require_known(plan.task, str(folder / PLAN))
    elif full_name(task) != plan.task:
        raise ConfigError(f"The comparison in {folder} is of the task {plan.task}, not of {full_name(task)}.")
    made = f"the comparison in {folder} was made. Give its relflat compare command again with another --out"
    require_unchanged(plan.task, values.get("source"), made)

    def read(jobs: Sequence[Job]) -> list[Trial]:
        done = [trial for trial in map(read_trial, jobs) if trial is not None]
        if len(done) < len(jobs):
            raise DataError(
                f"{len(jobs) - len(done)} of {len(jobs)} runs of the comparison in {folder} are not in its folder "
                "of runs. Give its relflat compare command again; it does what is missing."
            )
        return done

    comparison = conclude(plan, (folder / values["runs"]).resolve(), read, failed_of(folder))
    found = Summary(comparison, costs_of(folder, comparison))
    write_report(folder, found)
    return found
