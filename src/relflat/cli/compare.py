"""``relflat compare`` and ``relflat report``."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import rich.table
import tyro
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from relflat.cli.console import aside, bar_of, err, fail, out, print_json
from relflat.cli.engines import Engine
from relflat.cli.options import Budget, TaskName, common_values
from relflat.lab.compare.arms import ARMS

if TYPE_CHECKING:
    from relflat.lab.compare.search import Plan
    from relflat.lab.report.summary import Summary

    CommonValues = dict[str, Any]
else:
    CommonValues = common_values()

LEFT_OUT = 3  # exit code of a comparison that some arm could not take part in
ARMS_HELP = (
    f"what to compare; the first is what the others are held against. Known (docs/compare.md): {', '.join(ARMS)}."
)


def compare(
    task: TaskName,
    /,
    *,
    arms: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]", help=ARMS_HELP)] = (
        "plain",
        "smoothing",
        "dropout",
        "sam",
        "asam",
        "fam-default",
        "fam",
    ),
    budget: Budget = Budget(),  # noqa: B008, tyro reads the defaults from it
    common: CommonValues,
    engine: Engine = Engine(),  # noqa: B008, likewise
    runs: Path = Path("runs"),
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Does flatness-aware training help on this task, at what cost, and how sure is that?

    The same number of settings of each arm is tried on validation data, a few more where the best is the last of
    them; the best setting of each runs on fresh seeds and is tested once. With --trials 0 nothing is searched, and
    every arm has its usual setting; --also-untuned has both tables. With --recipe, or values of one, every arm has
    the same label smoothing, dropout and augmentation under it. Interrupted, the same command goes on where it
    stopped; finished runs are used again.

    An arm that cannot run on the task is left out: the others are compared, report and stderr say why, and the exit
    code is 3.

    Args:
        task: name of a task, or path/to/file.py:name for one of your own.
        arms: what to compare; the first is what the others are held against.
        budget: what each arm may spend.
        common: what all runs share, where an arm does not search it, as plain does the weight decay.
        engine: where the trials run.
        runs: folder that keeps the runs.
        out: folder of the report; by default one of its own in the folder of runs.
        json: print one JSON object.
    """
    from relflat.cli.plan import plan_for
    from relflat.lab.report import study
    from relflat.lab.report.verdict import left_out

    with aside():
        plan = plan_for(task, arms, budget, **common)
    folder = out or study.folder_for(plan, runs)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    pool = engine.pool(runs)
    study.open_study(folder, plan, runs, describe_plan(plan))
    with bar_of(columns, shown=err.is_terminal) as bar:
        line = bar.add_task("runs", total=plan.runs)
        with aside():
            found = study.carry_out(folder, plan, runs, pool, lambda trial: bar.advance(line))
    answer(folder, found, json)
    if found.comparison.failed:
        fail(f"not all arms ran: {'; '.join(left_out(found.comparison))}")
        sys.exit(LEFT_OUT)


def describe_plan(plan: "Plan") -> str:
    """What is run, in a few sentences."""
    from relflat.lab.report.formats import recipe_text
    from relflat.lab.tasks.catalogue import task_named

    config = plan.config(plan.arms[0], plan.arms[0].grid[0], plan.seeds[0])
    size = "All training samples" if config.train_size is None else f"{config.train_size:,} training samples"
    noise = f", each training label redrawn with probability {config.label_noise:g}" if config.label_noise else ""
    chosen = "Settings were chosen on validation data and tested once on fresh seeds."
    if plan.also_untuned:
        chosen += " A second table has every arm at its usual setting."
    if plan.untuned:
        chosen = "Nothing was searched: every arm has its usual setting."
    batches = f"{config.epochs} epochs, batches of {config.batch_size}"
    given = recipe_text(plan.common)
    recipe = (
        " Every arm has a recipe under it, chosen by plain training alone on validation data." if plan.recipe else ""
    )
    recipe = f" Every arm has this under it: {given}.{recipe}" if given else recipe
    return f"{task_named(plan.task).summary}. {size}{noise}; {batches}.{recipe} {chosen}"


def report(
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")],
    /,
    *,
    task: str | None = None,
    json: bool = False,
) -> None:
    """Write the report of a comparison again from its runs: HTML, Markdown, CSV, LaTeX and JSON.

    Args:
        folder: of the comparison.
        task: path/to/file.py:name, to import the task file of a comparison from elsewhere, which you trust.
        json: print one JSON object.
    """
    from relflat.lab.report import study

    with aside():
        found = study.rebuild(folder, task)
    answer(folder, found, json)


def show(summary: "Summary", console: Console) -> None:
    """Print the tables, the settings and the verdict, for 80 columns."""
    from relflat.lab.report.formats import named, recipe_text
    from relflat.lab.report.summary import chosen
    from relflat.lab.report.verdict import findings

    for each in summary.tables:
        show_table(each, console)
        names = [named(line.title, line.arm) for line in each.rows]
        width = max(map(len, names))
        console.print("as usually set:" if each.kind == "untuned" else "chosen on validation data:")
        for name, line in zip(names, each.rows, strict=True):
            console.print(f"  {name:<{width}}  {chosen(each, line)}", highlight=False, markup=False)
    if recipe := recipe_text(summary.comparison.plan.common):
        console.print(f"under every arm: {recipe}", highlight=False, markup=False)
    for text in findings(summary):
        console.print(f"- {text}", highlight=False, markup=False)


def show_table(summary: "Summary", console: Console) -> None:
    """Print one of the tables."""
    from relflat.lab.report.summary import table
    from relflat.lab.tasks.catalogue import title_of

    plan, shown = summary.comparison.plan, table(summary, "t")
    noise = plan.common.get("label_noise")
    what = title_of(plan.task) + (f", {100 * noise:g} % label noise" if noise else "")
    what += f", {summary.kind}: mean ± sd over n seeds" + ("; n = 1: no spread" if len(plan.seeds) == 1 else "")
    columns = [rich.table.Column(Text(heading)) for heading in shown.headings]
    grid = rich.table.Table(*columns, title=Text(what), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for cells in shown.rows:
        grid.add_row(*map(Text, cells))
    console.print(grid)


def answer(folder: Path, found: "Summary", json: bool) -> None:
    """Print what a comparison found and where its report is."""
    from relflat.lab.train import store

    if json:
        print_json({"folder": str(folder), **store.read_json(folder / "report.json")})
        return
    show(found, out)
    out.print(f"Report: {folder / 'report.html'}", highlight=False, soft_wrap=True)
