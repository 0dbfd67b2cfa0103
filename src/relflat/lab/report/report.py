"""The report of a comparison, as files and on a terminal: verdict, table, figures, and what was tried on what."""

import csv
import io
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from relflat.lab.common import jsonable
from relflat.lab.report.document import Document, Section, Table
from relflat.lab.report.figures import figures
from relflat.lab.report.formats import finite, named, settings_text
from relflat.lab.report.summary import Summary, table
from relflat.lab.report.verdict import findings
from relflat.lab.tasks.catalogue import title_of

PAIRS = ("score", "loss", "ece", "equal_time", "kappa", "kappa_before", "confidence", "weight_norm")
SPECIAL = {each: f"\\{each}" for each in "%_&#${}"} | {"±": r"$\pm$", "–": "--", "kappa": r"$\kappa$"}
SPECIAL |= {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def files(summary: Summary, environment: Mapping[str, Any], notes: str) -> dict[str, str]:
    """The text of each file of the report, by name; ``notes`` say in a sentence or two what was run."""
    untuned = summary.comparison.plan.untuned
    sections = [
        Section("Verdict", items=findings(summary)),
        Section("Results", table=replace(table(summary), note=reading(summary))),
        Section("Pictures", figures=figures(summary)),
        Section("What was tried", protocol(summary), table=None if untuned else tried(summary)),
    ]
    title = f"Does flatness-aware training help on {title_of(summary.comparison.plan.task)}?"
    tables = {"report.csv": comma_separated(summary), "report.tex": latex(table(summary, "p"))}
    return Document(title, notes, sections, environment).files() | tables


def reading(summary: Summary) -> str:
    """How to read the table."""
    first, what = summary.rows[0], summary.metric.title
    alone = "; n = 1 has no spread" if any(line.n == 1 for line in summary.rows) else ""
    return (
        f"Mean ± standard deviation over n seeds{alone}. kappa is the relative flatness of the task's layer on the "
        "training data (smaller is flatter); it also falls when a network only grows more confident, so read "
        f"it beside confidence and ||W||. A step of {first.title} takes {1000 * first.cost.seconds:.2f} ms; "
        "“step” is the median ratio to it, all arms taking turns in one single-thread process. On a network of "
        "a few small layers that is mostly call overhead; benchmarks/step_cost.py has the cost on ResNet-18. "
        f"“Validation at equal time” is the {what} on validation data when the first arm's training is over; an arm "
        "whose steps cost more is then in mid-schedule, at a learning rate that has not come down, so this is a "
        "lower bound. p-values: paired sign-flip permutation test, Holm-corrected. Intervals: BCa bootstrap over "
        "seeds, 95 % for all pairs together; with under about ten seeds they come out too narrow, so the verdict "
        "goes by p. They describe the spread over seeds, not over other test samples."
    )


def protocol(summary: Summary) -> str:
    """What was chosen, on what, and where the grids come from."""
    plan = summary.comparison.plan
    if plan.untuned:
        return (
            "Nothing was searched: every arm has the setting that its authors, or the usual recipes, print. They ran "
            f"on seeds {', '.join(map(str, plan.seeds))} and were tested once."
        )
    origins = "; ".join(f"{arm.title}: {arm.origin}" for arm in plan.arms if arm.origin)
    return (
        f"{len(plan.arms[0].values)} settings an arm, each on search seeds {', '.join(map(str, plan.search_seeds))}. "
        f"The setting with the highest mean validation {summary.metric.title} was chosen; the test split was "
        "not evaluated in these trials. The chosen settings then ran on fresh seeds "
        f"{', '.join(map(str, plan.seeds))} and were tested once. Where the grids come from: {origins}."
    )


def tried(summary: Summary) -> Table:
    """All settings of the search and how they did on validation data."""
    comparison = summary.comparison
    titles = {arm.name: named(arm.title, arm.name) for arm in comparison.arms}
    rows = [
        (
            titles[each.arm],
            f"{each.diverged} diverged" if each.diverged else f"{100 * each.score:.2f}",
            finite(each.loss, ".3f"),
            settings_text(each.settings) + (" ← chosen" if each is comparison.chosen[each.arm] else ""),
        )
        for each in comparison.candidates
    ]
    headings = ("arm", f"validation {summary.metric.title}, %", "validation loss", "settings")
    return Table("What was tried", headings, rows)


def comma_separated(summary: Summary) -> str:
    """The table as CSV with all digits: a mean and a deviation of each number, nothing where there is none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [summary.metric.name.lstrip("=+-@\t\r") if name == "score" else name for name in PAIRS]
    titles = [f"{name}_{part}" for name in names for part in ("mean", "sd")]
    writer.writerow(["arm", "n", "diverged", *titles, "seconds_per_step", "step_ratio", "settings"])
    for line in summary.rows:
        numbers = jsonable.finite([value for name in PAIRS for value in getattr(line, name)])
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
    return re.sub("|".join(map(re.escape, SPECIAL)), lambda found: SPECIAL[found[0]], " ".join(text.split()))
