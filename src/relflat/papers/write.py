"""The report of an experiment: report.html, report.md and report.json, which need no network.

The figures are in the page; the other two have the same words and numbers.
"""

import html
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from relflat.errors import ConfigError
from relflat.lab.report.export import markdown_table
from relflat.lab.report.figures import captioned
from relflat.lab.report.page import page, table
from relflat.lab.report.report import where
from relflat.lab.train import store
from relflat.lab.train.environment import describe
from relflat.papers.experiment import Context, Experiment, Outcome, Table

SCALES = {"small": "small scale", "paper": "the paper's scale"}


def open_folders(context: Context) -> None:
    """Make the folders of the report and of the runs.

    Raises:
        ConfigError: one cannot be made.
    """
    for option, folder in (("--out", context.out), ("--runs", context.runs)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"Cannot write to {folder}: {error.strerror}. Choose another place with {option}."
            ) from error


def write(experiment: Experiment, context: Context, outcome: Outcome) -> dict[str, Any]:
    """Write the report in all three forms.

    Args:
        experiment: what was run.
        context: what it ran with.
        outcome: what came out.

    Returns:
        The content of ``report.json``.
    """
    environment = describe()
    values = as_values(experiment, context, outcome, environment)
    store.write_text(context.out / "report.html", as_page(experiment, context, outcome, environment))
    store.write_text(context.out / "report.md", as_markdown(experiment, context, outcome, environment))
    store.write_json(context.out / "report.json", values)
    return store.as_json(values)


def title(experiment: Experiment, context: Context) -> str:
    """The first line of the report."""
    return f"{experiment.name}: {experiment.summary} ({SCALES[context.scale]})"


def as_values(
    experiment: Experiment, context: Context, outcome: Outcome, environment: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything but the figures as plain values."""
    return {
        "experiment": experiment.name,
        "summary": experiment.summary,
        "scale": context.scale,
        "paper": experiment.paper,
        "findings": outcome.findings,
        "scaled": outcome.scaled,
        "tables": [asdict(found) for found in outcome.tables],
        "data": outcome.data,
        "environment": environment,
    }


def as_markdown(
    experiment: Experiment, context: Context, outcome: Outcome, environment: Mapping[str, Any]
) -> str:
    """The report's words and tables."""
    parts = [
        f"# {title(experiment, context)}",
        f"The paper: {experiment.paper}",
        "## What came out",
        bullets(outcome.findings),
        *(part for found in outcome.tables for part in table_parts(found)),
    ]
    if outcome.scaled:
        parts += ["## What differs from the paper", bullets(outcome.scaled)]
    if outcome.figures:
        names = "; ".join(figure.title.lower() for figure in outcome.figures)
        parts.append(f"Figures, in [report.html](report.html): {names}.")
    parts.append(f"`relflat reproduce {experiment.name} --scale {context.scale}`. {where(environment)}")
    return "\n\n".join(parts) + "\n"


def bullets(lines: list[str]) -> str:
    """A list in Markdown."""
    return "\n".join(f"- {line}" for line in lines)


def table_parts(found: Table) -> list[str]:
    """A table in Markdown with its title and note."""
    parts = [f"## {found.title}", markdown_table(found.headings, found.rows)]
    return [*parts, found.note] if found.note else parts


def as_page(
    experiment: Experiment, context: Context, outcome: Outcome, environment: Mapping[str, Any]
) -> str:
    """The report as one HTML file."""
    name = title(experiment, context)
    body = [
        f"<h1>{html.escape(name)}</h1>",
        f'<p class="lead">The paper: {html.escape(experiment.paper)}</p>',
        '<section class="verdict"><h2>What came out</h2>',
        items(outcome.findings),
        "</section>",
        *(html_table(found) for found in outcome.tables),
    ]
    if outcome.figures:
        body += [
            "<h2>Pictures</h2>",
            '<div class="figures">',
            *(captioned(figure.paint, figure.title, figure.caption) for figure in outcome.figures),
            "</div>",
        ]
    if outcome.scaled:
        body += ["<h2>What differs from the paper</h2>", f'<div class="small">{items(outcome.scaled)}</div>']
    command = f"<code>relflat reproduce {experiment.name} --scale {context.scale}</code>"
    body += ["<h2>Where</h2>", f'<p class="small">{command}. {html.escape(where(environment))}</p>']
    return page(name, "\n".join(body))


def items(lines: list[str]) -> str:
    """A list in HTML."""
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def html_table(found: Table) -> str:
    """A table with its title and note."""
    note = f'<p class="small">{html.escape(found.note)}</p>' if found.note else ""
    return f"<h2>{html.escape(found.title)}</h2>{table(found.headings, found.rows)}{note}"
