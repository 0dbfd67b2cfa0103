"""A comparison as Markdown, CSV and LaTeX, beside the page."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from relflat.lab.compare import Comparison
from relflat.lab.report import TRIED_HEADINGS, findings, protocol, reading, title, tried, where
from relflat.lab.summary import HEADINGS, Row, cells, rows
from relflat.lab.timing import StepCost


def markdown(
    comparison: Comparison, costs: Mapping[str, StepCost], environment: Mapping[str, Any], notes: str
) -> str:
    """The report's text and tables."""
    lines = rows(comparison, costs)
    parts = [
        f"# {title(comparison)}",
        notes,
        "\n".join(f"- {text}" for text in findings(comparison, lines)),
        markdown_table(HEADINGS, [cells(line) for line in lines]),
        reading(lines),
        "## What was tried",
        protocol(comparison),
        markdown_table(TRIED_HEADINGS, tried(comparison)),
        where(environment),
    ]
    return "\n\n".join(parts) + "\n"


def markdown_table(headings: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; bars inside cells are escaped."""
    lines = [headings, ["---"] * len(headings), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


PAIRS = ("accuracy", "loss", "ece", "equal_time", "kappa", "confidence", "weight_norm")


def comma_separated(lines: Sequence[Row]) -> str:
    """The table as CSV with all digits: a mean and a deviation of each number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    headings = [f"{name}_{part}" for name in PAIRS for part in ("mean", "sd")]
    writer.writerow(["arm", "n", "diverged", *headings, "seconds_per_step", "step_ratio", "settings"])
    for line in lines:
        numbers = [value for name in PAIRS for value in getattr(line, name)]
        settings = " ".join(f"{key}={value}" for key, value in line.settings.items())
        cost = (line.cost.seconds, line.cost.ratio)
        writer.writerow([line.arm, line.n, line.diverged, *numbers, *cost, settings])
    return text.getvalue()


LATEX = {"arm", "test accuracy, %", "n", "test loss", "ECE, %", "kappa", "step"}
SPECIAL = {"%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "±": r"$\pm$", "kappa": r"$\kappa$"}


def latex(lines: Sequence[Row]) -> str:
    """The table for a paper; needs the package booktabs."""
    headings = [heading for heading in HEADINGS if heading in LATEX]

    def written(texts: Iterable[str]) -> str:
        return " & ".join(map(latex_text, texts)) + r" \\"

    return "\n".join(
        [
            rf"\begin{{tabular}}{{l{'r' * (len(headings) - 1)}}}",
            r"\toprule",
            written(headings),
            r"\midrule",
            *(written(cells(line, headings)) for line in lines),
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
