"""A comparison's table as CSV and LaTeX."""

import csv
import io

from relflat.lab.common.jsonable import finite
from relflat.lab.report.document import Table
from relflat.lab.report.summary import Summary

PAIRS = ("score", "loss", "ece", "equal_time", "kappa", "kappa_before", "confidence", "weight_norm")
SPECIAL = {"%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "±": r"$\pm$", "–": "--", "kappa": r"$\kappa$"}


def comma_separated(summary: Summary) -> str:
    """The table as CSV with all digits: a mean and a deviation of each number, nothing where there is none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [summary.metric.name if name == "score" else name for name in PAIRS]
    titles = [f"{name}_{part}" for name in names for part in ("mean", "sd")]
    writer.writerow(["arm", "n", "diverged", *titles, "seconds_per_step", "step_ratio", "settings"])
    for line in summary.rows:
        numbers = finite([value for name in PAIRS for value in getattr(line, name)])
        settings = " ".join(f"{key}={value}" for key, value in line.settings.items())
        cost = (line.cost.seconds, line.cost.ratio)
        writer.writerow([line.arm, line.n, line.diverged, *numbers, *cost, settings])
    return text.getvalue()


def latex(table: Table) -> str:
    """A table for a paper; needs the package booktabs."""
    head, *body = [" & ".join(map(latex_text, line)) + r" \\" for line in (table.headings, *table.rows)]
    start = rf"\begin{{tabular}}{{l{'r' * (len(table.headings) - 1)}}}"
    return "\n".join([start, r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""])


def latex_text(text: str) -> str:
    """Escape what LaTeX reads as a command."""
    for plain, command in SPECIAL.items():
        text = text.replace(plain, command)
    return text
