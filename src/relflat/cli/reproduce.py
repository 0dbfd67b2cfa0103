"""``relflat reproduce``."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from relflat.cli.console import aside, err, out, print_json, print_table, say
from relflat.errors import ConfigError

if TYPE_CHECKING:
    from relflat.papers.experiment import Context


def reproduce(
    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]")] = None,
    /,
    *,
    scale: Literal["small", "paper"] = "small",
    out: Path | None = None,
    runs: Path = Path("runs"),
    workers: int = 2,
    json: bool = False,
) -> None:
    """Run an experiment of the papers, and report its numbers beside theirs; without a name, list the experiments.

    Interrupted, the same command goes on where it stopped; finished runs are used again.

    Args:
        name: table1, table2, table3, cost, correlation, invariance, layers or grokking.
        scale: small fits two cores in minutes and says what it scaled; paper uses the paper's settings.
        out: folder of the report; by default one of its own in the folder of runs.
        runs: folder that keeps the runs.
        workers: processes, one thread each.
        json: print one JSON object.
    """
    from relflat.lab.common.names import look_up
    from relflat.papers.catalogue import EXPERIMENTS
    from relflat.papers.experiment import Context, write

    if name is None:
        summaries = {known: EXPERIMENTS[known].summary for known in EXPERIMENTS}
        print_json(summaries) if json else print_table("experiments", ("name", "what"), summaries.items())
        return
    experiment = look_up("experiment", name, EXPERIMENTS)
    folder = out or runs / f"reproduce-{name}-{scale}"
    context = Context(scale, folder, runs, workers, say if err.is_terminal else lambda line: None)
    with aside():
        open_folders(context)
        values = write(experiment, context, experiment.run(context))
    if json:
        print_json({"folder": str(folder), **values})
    else:
        show(values, folder)


def open_folders(context: "Context") -> None:
    """Make the folders of the report and of the runs; the report's must be new, or one of before."""
    from relflat.lab.train import store

    kind = "a report's folder; choose another --out"
    store.require_ours(context.out, store.REPORT_MARK, "report.json", {"experiment"}, kind)
    for option, folder in (("--out", context.out), ("--runs", context.runs)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"Cannot write to {folder}: {error.strerror}. Choose another place with {option}."
            ) from error
    with store.writing(context.out, "--out"):
        (context.out / store.REPORT_MARK).touch()


def show(values: Mapping[str, Any], folder: Path) -> None:
    """Print the findings, the tables that fit the terminal, and where the report is."""
    for line in values["findings"]:
        out.print(f"- {line}", highlight=False, markup=False)
    for table in filter(fits, values["tables"]):
        print_table(table["title"], table["headings"], table["rows"])
    out.print(f"Report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


def fits(table: Mapping[str, Any]) -> bool:
    """Whether a table can be shown without breaking words."""
    columns = zip(table["headings"], *table["rows"], strict=True)
    return sum(max(map(len, column)) + 3 for column in columns) < out.width
