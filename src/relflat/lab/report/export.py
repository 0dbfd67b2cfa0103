"""A comparison as Markdown, CSV and LaTeX, beside the page."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from relflat.lab.compare.search import Comparison
from relflat.lab.jsonable import finite
from relflat.lab.report.report import findings, protocol, reading, title, tried, tried_headings, where
from relflat.lab.report.summary import Column, Row, cells, columns, headings, rows
from relflat.lab.train.timing import StepCost


def markdown(
    comparison: Comparison, costs: Mapping[str, StepCost], environment: Mapping[str, Any], notes: str
) -> str:
    """The report's text and tables."""
    lines, shown = rows(comparison, costs), columns(comparison)
    parts = [
        f"# {title(comparison)}",
        notes,
        "\n".join(f"- {text}" for text in findings(comparison, lines)),
        markdown_table(headings(shown), [cells(line, shown) for line in lines]),
        reading(comparison, lines),
        "## What was tried",
        protocol(comparison),
        markdown_table(tried_headings(comparison), tried(comparison)),
        where(environment),
    ]
    return "\n\n".join(parts) + "\n"


def markdown_table(headings: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; bars inside cells are escaped."""
    lines = [headings, ["---"] * len(headings), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


PAIRS = ("score", "loss", "ece", "equal_time", "kappa", "kappa_before", "confidence", "weight_norm")


def comma_separated(lines: Sequence[Row], metric: str) -> str:
    """The table as CSV with all digits: a mean and a deviation of each number, nothing where there is none.

    Args:
        lines: an arm each.
        metric: name of what the task is judged by.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    titles = [f"{metric if name == 'score' else name}_{part}" for name in PAIRS for part in ("mean", "sd")]
    writer.writerow(["arm", "n", "diverged", *titles, "seconds_per_step", "step_ratio", "settings"])
    for line in lines:
        numbers = finite([value for name in PAIRS for value in getattr(line, name)])
        settings = " ".join(f"{key}={value}" for key, value in line.settings.items())
        cost = (line.cost.seconds, line.cost.ratio)
        writer.writerow([line.arm, line.n, line.diverged, *numbers, *cost, settings])
    return text.getvalue()


SPECIAL = {"%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "±": r"$\pm$", "–": "--", "kappa": r"$\kappa$"}


def latex(lines: Sequence[Row], shown: Sequence[Column]) -> str:
    """The table for a paper; needs the package booktabs.

    Args:
        lines: an arm each.
        shown: the columns.
    """

    def written(texts: Iterable[str]) -> str:
        return " & ".join(map(latex_text, texts)) + r" \\"

    return "\n".join(
        [
            rf"\begin{{tabular}}{{l{'r' * (len(shown) - 1)}}}",
            r"\toprule",
            written(headings(shown)),
            r"\midrule",
            *(written(cells(line, shown)) for line in lines),
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def latex_text(text: str) -> str:
    """Escape what LaTeX reads as a command."""
    for plain, command in SPECIAL.items():
        text = text.replace(plain, command)
    return text
