"""The report of a comparison: verdict, table, figures, and what was tried on what."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from relflat.lab.report.document import Document, Section, Table
from relflat.lab.report.export import comma_separated, latex
from relflat.lab.report.figures import figures
from relflat.lab.report.formats import finite, named, settings_text
from relflat.lab.report.summary import Summary, table
from relflat.lab.report.verdict import findings
from relflat.lab.tasks.catalogue import title_of


def files(summary: Summary, environment: Mapping[str, Any], notes: str) -> dict[str, str]:
    """The text of each file of the report, by name."""
    tables = {"report.csv": comma_separated(summary), "report.tex": latex(table(summary, "p"))}
    return document(summary, environment, notes).files() | tables


def document(summary: Summary, environment: Mapping[str, Any], notes: str) -> Document:
    """The report as data; ``notes`` say in a sentence or two what was run."""
    sections = [
        Section("Verdict", items=findings(summary)),
        Section("Results", table=replace(table(summary), note=reading(summary))),
        Section("Pictures", figures=figures(summary)),
        Section("What was tried", protocol(summary), table=tried(summary)),
    ]
    title = f"Does flatness-aware training help on {title_of(summary.comparison.plan.task)}?"
    return Document(title, notes, sections, environment)


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
    titles = {arm.name: named(arm.title, arm.name) for arm in comparison.plan.arms}
    rows = [
        (
            titles[candidate.arm],
            f"{candidate.diverged} diverged" if candidate.diverged else f"{100 * candidate.score:.2f}",
            finite(candidate.loss, ".3f"),
            settings_text(candidate.settings)
            + (" ← chosen" if candidate is comparison.chosen[candidate.arm] else ""),
        )
        for candidate in comparison.candidates
    ]
    headings = ("arm", f"validation {summary.metric.title}, %", "validation loss", "settings")
    return Table("What was tried", headings, rows)
