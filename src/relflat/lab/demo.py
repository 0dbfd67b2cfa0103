"""The main job: does flatness-aware training help on noisy digits, and what does it cost?

``python -m relflat.lab.demo --out demo`` compares plain training, SAM and FAM on scikit-learn's digits
with 20 % label noise. Each method gets six settings, judged on validation data; the best runs on three
fresh seeds and is tested once. The ranges of the settings were laid out by looking at validation data of
other seeds, so that each method's best one lies inside its range.
"""

import shutil
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from relflat.errors import ConfigError, RelflatError
from relflat.lab.compare import Comparison, Plan, Values, compare
from relflat.lab.environment import describe
from relflat.lab.figures import TITLES
from relflat.lab.report import render
from relflat.lab.store import write_json, write_text
from relflat.lab.summary import (
    SHORT_HEADINGS,
    accuracy_differences,
    remarks,
    rows,
    settings_text,
    short_cells,
    verdict,
)
from relflat.lab.timing import StepCost, step_costs
from relflat.lab.trials import Trial, workers

GRIDS: dict[str, list[Values]] = {
    "plain": [{"weight_decay": value} for value in (0.0, 5e-4, 2e-3, 5e-3, 1e-2, 2e-2)],
    "sam": [{"rho": value} for value in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)],
    "fam": [
        {"strength": 0.03, "gradient": "full"},
        {"strength": 0.1, "gradient": "frozen"},
        {"strength": 1.0, "radius": 1.5, "regularize": "fc2"},
        {"strength": 1.0, "radius": 0.5, "regularize": "fc*"},
        {"strength": 1.0, "radius": 0.7, "regularize": "fc*"},
        {"strength": 1.0, "radius": 1.0, "regularize": "fc*"},
    ],
}
SEARCH_SEEDS = (100, 101)
LABEL_NOISE = 0.2
EPOCHS = 30


def plan(seeds: int) -> Plan:
    """What the demo compares."""
    return Plan("digits", {"label_noise": LABEL_NOISE, "epochs": EPOCHS}, GRIDS, SEARCH_SEEDS, range(seeds))


def run(out: Path, seeds: int, console: Console) -> tuple[Comparison, dict[str, StepCost]]:
    """Compare the methods and time their steps.

    Args:
        out: folder for the runs; those of an earlier demo are removed.
        seeds: number of tested seeds a method.
        console: where progress is shown, if it is a terminal.
    """
    what = plan(seeds)
    runs = out / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    total = sum(len(grid) for grid in GRIDS.values()) * len(SEARCH_SEEDS) + len(GRIDS) * seeds
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar,
        workers(2) as pool,
    ):
        task = bar.add_task("training", total=total)

        def on_trial(trial: Trial) -> None:
            bar.advance(task)

        comparison = compare(what, runs, pool, on_trial)
    torch.set_num_threads(1)
    chosen = {
        method: what.config(method, candidate.settings, seed=0)
        for method, candidate in comparison.chosen.items()
    }
    costs = dict(zip(chosen, step_costs(list(chosen.values())), strict=True))
    return comparison, costs


def summary(comparison: Comparison, costs: dict[str, StepCost]) -> dict[str, object]:
    """The numbers behind the report."""
    return {
        "task": comparison.plan.task,
        "common": dict(comparison.plan.common),
        "seeds": list(comparison.plan.seeds),
        "methods": [line.__dict__ | {"cost": line.cost.__dict__} for line in rows(comparison, costs)],
        "differences": [pair.__dict__ for pair in accuracy_differences(comparison)],
        "verdict": verdict(accuracy_differences(comparison)),
    }


def show(comparison: Comparison, costs: dict[str, StepCost], console: Console) -> None:
    """Print the table, the chosen settings and the verdict."""
    lines = rows(comparison, costs)
    seeds = len(comparison.plan.seeds)
    table = Table(title=f"digits, 20 % label noise: mean ± sd over {seeds} seeds", title_justify="left")
    for heading in SHORT_HEADINGS:
        table.add_column(heading)
    for line in lines:
        table.add_row(*short_cells(line))
    console.print(table)
    for line in lines:
        diverged = f" ({line.diverged} of {seeds} seeds diverged)" if line.diverged else ""
        console.print(f"{TITLES[line.method]:<6} {settings_text(line.settings)}{diverged}", highlight=False)
    for text in [*verdict(accuracy_differences(comparison)), *remarks(comparison, lines)]:
        console.print(f"- {text}", highlight=False)


def main(out: Path = Path("demo"), seeds: Annotated[int, tyro.conf.arg(metavar="N")] = 3) -> None:
    """Compare plain training, SAM and FAM on noisy digits and write a report.

    Args:
        out: folder for report.html, report.json and the runs.
        seeds: number of tested seeds a method.
    """
    if not 2 <= seeds <= 100:
        raise ConfigError(f"seeds={seeds} must lie between 2 and 100.")
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    comparison, costs = run(out, seeds, Console(stderr=True))
    notes = (
        "Plain training, SAM and FAM on scikit-learn's digits: 897 training, 400 validation and 500 test "
        f"pictures, each training label redrawn with probability {LABEL_NOISE:g}. Settings were chosen on "
        "validation data, the same number for each method."
    )
    write_text(out / "report.html", render(comparison, costs, describe(), notes))
    write_json(out / "report.json", {**summary(comparison, costs), "environment": describe()})
    console = Console()
    show(comparison, costs, console)
    console.print(
        f"{time.perf_counter() - start:.0f} s. Report: {out / 'report.html'}", highlight=False, soft_wrap=True
    )


if __name__ == "__main__":
    try:
        tyro.cli(main, prog="python -m relflat.lab.demo")
    except RelflatError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
