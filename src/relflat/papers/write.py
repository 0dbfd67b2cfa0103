"""The report of an experiment: report.html, report.md with its figures, and report.json; none needs a network."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from relflat.errors import ConfigError
from relflat.lab.report.document import Document, Section
from relflat.lab.train import store
from relflat.lab.train.environment import describe
from relflat.papers.experiment import Context, Experiment, Outcome

SCALES = {"small": "small scale", "paper": "the paper's scale"}


def open_folders(context: Context) -> None:
    """Make the folders of the report and of the runs."""
    for option, folder in (("--out", context.out), ("--runs", context.runs)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"Cannot write to {folder}: {error.strerror}. Choose another place with {option}."
            ) from error


def write(experiment: Experiment, context: Context, outcome: Outcome) -> dict[str, Any]:
    """Write the report in all its forms; return the content of ``report.json``."""
    environment = describe()
    values = {
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
    for name, text in document(experiment, context, outcome, environment).files().items():
        store.write_text(context.out / name, text)
    store.write_json(context.out / "report.json", values)
    return store.as_json(values)


def document(experiment: Experiment, context: Context, outcome: Outcome, environment: Mapping[str, Any]) -> Document:
    """The report of an experiment."""
    return Document(
        f"{experiment.name}: {experiment.summary} ({SCALES[context.scale]})",
        f"The paper: {experiment.paper}",
        [
            Section("What came out", items=outcome.findings),
            *(Section(found.title, table=found) for found in outcome.tables),
            *([Section("Pictures", figures=outcome.figures)] if outcome.figures else []),
            *([Section("What differs from the paper", items=outcome.scaled)] if outcome.scaled else []),
        ],
        environment,
        f"relflat reproduce {experiment.name} --scale {context.scale}",
    )
