"""``relflat compare`` and ``relflat report``."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from relflat.cli.arguments import TaskName
from relflat.cli.console import err, out, print_json
from relflat.cli.options import common_values
from relflat.lab.compare.arms import ARMS

if TYPE_CHECKING:
    CommonValues = dict[str, Any]
else:
    CommonValues = common_values()

ARMS_HELP = (
    "what to compare; the first is what the others are held against. "
    f"Known (docs/compare.md): {', '.join(ARMS)}."
)


def compare(
    task: TaskName,
    /,
    *,
    arms: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]", help=ARMS_HELP)] = (
        "plain",
        "sam",
        "fam",
        "fam-radius",
    ),
    seeds: int = 8,
    first_seed: int = 0,
    search_seeds: int = 2,
    trials: int = 4,
    common: CommonValues,
    runs: Path = Path("runs"),
    out: Path | None = None,
    workers: int = 2,
    engine: str = "local",
    address: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None,
    gpus: float = 0.0,
    json: bool = False,
) -> None:
    """Does flatness-aware training help on this task, at what cost, and how sure is that?

    The same number of settings of each arm is tried on validation data; the best setting of each runs on fresh seeds
    and is tested once. Interrupted, the same command goes on where it stopped; finished runs are used again.

    Args:
        task: name of a task, or path/to/file.py:name for one of your own.
        arms: what to compare; the first is what the others are held against.
        seeds: number of tested seeds an arm.
        first_seed: the first of them; another one repeats a comparison on seeds of its own.
        search_seeds: number of seeds that settings are chosen by (100, 101, ...).
        trials: number of settings an arm, at most as many as its grid has.
        common: what all runs share, where an arm does not search it, as plain does the weight decay.
        runs: folder that keeps the runs.
        out: folder of the report; by default one of its own in the folder of runs.
        workers: processes, one thread each; a running Ray cluster decides that itself.
        engine: local, or ray for a Ray cluster; its machines must share the folder of runs under the same path, and
            the task's file and data must be on all of them.
        address: of a running Ray cluster; by default $RAY_ADDRESS, else a Ray of its own on this machine.
        gpus: GPUs a trial takes of a Ray cluster, or a share of one; 0 trains on CPUs.
        json: print one JSON object.
    """
    from relflat.lab.compare import study
    from relflat.lab.compare.engines import engine_named
    from relflat.lab.report.terminal import show
    from relflat.lab.train import store

    plan = study.plan_for(
        task,
        arms,
        seeds=seeds,
        first_seed=first_seed,
        search_seeds=search_seeds,
        trials=trials,
        **common,
    )
    folder = out or study.folder_for(plan, runs)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    pool = engine_named(engine, processes=workers, runs=runs, address=address, gpus=gpus)
    study.open_study(folder, plan, runs, study.describe_plan(plan))
    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as bar:
        line = bar.add_task("runs", total=plan.runs)

        def on_trial(trial: Any) -> None:
            bar.advance(line)

        with redirect_stdout(sys.stderr):  # what a task's file or Ray print is no part of the answer
            comparison, costs = study.carry_out(folder, plan, runs, pool, on_trial)
    if json:
        print_json({"folder": str(folder), **store.read_json(folder / "report.json")})
        return
    show(comparison, costs, console())
    say_where(folder)


def report(
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")], /, *, json: bool = False
) -> None:
    """Write the report of a comparison again from its runs: HTML, Markdown, CSV, LaTeX and JSON.

    Args:
        folder: of the comparison.
        json: print one JSON object.
    """
    from relflat.lab.compare import study
    from relflat.lab.report.terminal import show
    from relflat.lab.train import store

    comparison = study.rebuild(folder)
    if json:
        print_json({"folder": str(folder), **store.read_json(folder / "report.json")})
        return
    show(comparison, study.costs_of(folder, comparison), console())
    say_where(folder)


def console() -> Any:
    """The terminal; ``out`` is an option's name inside the commands."""
    return out


def say_where(folder: Path) -> None:
    """Print the path of the report."""
    out.print(f"Report: {folder / 'report.html'}", highlight=False, soft_wrap=True)
