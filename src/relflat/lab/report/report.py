"""The report of a comparison, as files and on a terminal: verdict, table, figures, and what was tried on what."""

import csv
import io
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from relflat.lab.common import jsonable
from relflat.lab.compare.search import RECIPE, choose
from relflat.lab.report.document import TEMPLATES, Document, Section, Table
from relflat.lab.report.figures import figures, gain_against_cost
from relflat.lab.report.formats import finite, named, recipe_text, settings_text
from relflat.lab.report.summary import Summary, beyond_accuracy, table
from relflat.lab.report.verdict import findings
from relflat.lab.tasks.catalogue import title_of

NOTES = TEMPLATES.get_template("notes.txt")
PAIRS = ("score", "loss", "ece", "equal_time", "kappa", "kappa_before", "confidence", "weight_norm")
SPECIAL = {each: f"\\{each}" for each in "%_&#${}"} | {"±": r"$\pm$", "–": "--", "kappa": r"$\kappa$"}
NAMED = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater"}
SPECIAL |= {each: rf"\text{name}{{}}" for each, name in NAMED.items()}


def files(summary: Summary, environment: Mapping[str, Any], notes: str) -> dict[str, str]:
    """The text of each file of the report, by name; ``notes`` say in a sentence or two what was run."""
    results = [(table(each), beyond_accuracy(each)) for each in summary.tables]
    notes_below = (how_to_read("results", summary), how_to_read("beyond", summary))
    gains = [figure for each in summary.tables if (figure := gain_against_cost(each)) is not None]
    sections = [
        Section("Verdict", items=findings(summary), figures=gains),
        *(
            Section(shown.title, table=replace(shown, note="" if place else note))
            for place, pair in enumerate(results)
            for shown, note in zip(pair, notes_below, strict=True)
        ),
        Section("Pictures", figures=figures(summary)),
        Section("What was tried", how_to_read("protocol", summary), table=tried(summary)),
    ]
    title = f"Does flatness-aware training help on {title_of(summary.comparison.plan.task)}?"
    tables = {"report.csv": comma_separated(summary), "report.tex": latex(table(summary, "p"))}
    return Document(title, notes, sections, environment).files() | tables


def how_to_read(part: str, summary: Summary) -> str:
    """A paragraph of the template ``notes.txt``: how to read a table, or what was chosen and on what."""
    comparison, plan = summary.comparison, summary.comparison.plan
    counts = {title: sum(bool(each.trials) for each in own) for title, own in summary.tried.items()}
    values = {
        "alone": any(line.n == 1 for line in summary.rows),
        "lacking": sum("corrupted" not in result for result in summary.results),
        "corrupted": list(dict.fromkeys(name for result in summary.results for name in result.get("corrupted", ()))),
        "recipe": recipe_text(plan.common),
        "tried": ", ".join(f"{title} {count or 'none'}" for title, count in counts.items()),
        "origins": "; ".join(f"{arm.title}: {arm.origin}" for arm in plan.arms if arm.origin),
    }
    return " ".join(NOTES.render(part=part, summary=summary, plan=plan, comparison=comparison, **values).split())


def tried(summary: Summary) -> Table | None:
    """All settings of the search, of a recipe first, and how they did on validation data."""
    comparison, best = summary.comparison, dict(summary.comparison.chosen)
    titles = {RECIPE: "recipe", **{arm.name: named(arm.title, arm.name) for arm in comparison.arms}}
    if comparison.recipe:
        best[RECIPE] = choose(comparison.recipe, RECIPE)
    candidates = [each for each in (*comparison.recipe, *comparison.candidates) if each.trials]
    rows = [
        (
            titles[each.arm],
            f"{each.diverged} diverged" if each.diverged else f"{100 * each.score:.2f}",
            finite(each.loss, ".3f"),
            settings_text(each.settings) + (" ← chosen" if each is best[each.arm] else ""),
        )
        for each in candidates
    ]
    headings = ("arm", f"validation {summary.metric.title}, %", "validation loss", "settings")
    return Table("What was tried", headings, rows) if rows else None


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
