"""A comparison on a terminal of 80 columns."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from relflat.lab.compare.search import Comparison
from relflat.lab.compare.study import Costs
from relflat.lab.report.report import findings
from relflat.lab.report.summary import cells, columns, headings, named, rows, settings_text
from relflat.lab.tasks.catalogue import title_of


def show(comparison: Comparison, costs: Costs, console: Console) -> None:
    """Print the table, the chosen settings and the verdict."""
    lines, plan = rows(comparison, costs), comparison.plan
    noise = plan.common.get("label_noise")
    what = escape(title_of(plan.task)) + (f", {100 * noise:g} % label noise" if noise else "")
    table = Table(
        title=f"{what}: mean ± sd over n seeds" + ("; n = 1: no spread" if len(plan.seeds) == 1 else ""),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    shown = columns(comparison, "t")
    for heading in headings(shown):
        table.add_column(heading)
    for line in lines:
        table.add_row(*cells(line, shown))
    console.print(table)
    names = [named(line.title, line.arm) for line in lines]
    width = max(map(len, names))
    console.print("chosen on validation data:")
    for name, line in zip(names, lines, strict=True):
        console.print(f"  {name:<{width}}  {settings_text(line.settings)}", highlight=False)
    for text in findings(comparison, lines):
        console.print(f"- {text}", highlight=False)
