"""A comparison on a terminal of 80 columns."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from relflat.lab.report.formats import named, settings_text
from relflat.lab.report.summary import Summary, table
from relflat.lab.report.verdict import findings
from relflat.lab.tasks.catalogue import title_of


def show(summary: Summary, console: Console) -> None:
    """Print the table, the chosen settings and the verdict."""
    plan, shown = summary.comparison.plan, table(summary, "t")
    noise = plan.common.get("label_noise")
    what = escape(title_of(plan.task)) + (f", {100 * noise:g} % label noise" if noise else "")
    what += ": mean ± sd over n seeds" + ("; n = 1: no spread" if len(plan.seeds) == 1 else "")
    grid = Table(*shown.headings, title=what, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for cells in shown.rows:
        grid.add_row(*cells)
    console.print(grid)
    names = [named(line.title, line.arm) for line in summary.rows]
    width = max(map(len, names))
    console.print("chosen on validation data:")
    for name, line in zip(names, summary.rows, strict=True):
        console.print(f"  {name:<{width}}  {settings_text(line.settings)}", highlight=False)
    for text in findings(summary):
        console.print(f"- {text}", highlight=False)
