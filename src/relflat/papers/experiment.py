"""What an experiment is, what it is given, what it hands back, and its report.

The report is report.html, report.md with its figures, and report.json; none needs a network.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from relflat.lab.report.document import Document, Section
from relflat.lab.report.document import Figure as Figure
from relflat.lab.report.document import Table as Table
from relflat.lab.train import store
from relflat.lab.train.environment import describe

Scale = Literal["small", "paper"]  # two cores in minutes, or the paper's numbers
SCALES = {"small": "small scale", "paper": "the paper's scale"}


@dataclass(frozen=True)
class Outcome:
    """What came out."""

    findings: list[str]  # plain sentences; "not reproduced" is one of the things they may say
    tables: list[Table]
    figures: list[Figure]
    scaled: list[str]  # what differs from the paper, and why
    data: Mapping[str, Any]  # all numbers, as JSON can hold them


@dataclass(frozen=True)
class Context:
    """What an experiment runs with."""

    scale: Scale
    out: Path  # folder of the report
    runs: Path  # folder that keeps trainings and other results worth keeping
    workers: int = 1  # processes, one thread each
    on_progress: Callable[[str], None] = lambda line: None  # told in a line what has been done

    def counter(self, what: str, total: int) -> Callable[[object], None]:
        """A function to call after each one is done; it tells how many are, out of how many."""
        numbers = count(1)
        return lambda each: self.on_progress(f"{next(numbers)} of {total} {what}")


@dataclass(frozen=True)
class Experiment:
    """One table or figure of a paper, as code."""

    name: str
    summary: str
    paper: str  # what the paper reports, with its numbers and the place
    run: Callable[[Context], Outcome]  # what is kept in ``Context.runs`` is not done twice


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
    document = Document(
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
    for name, text in document.files().items():
        store.write_text(context.out / name, text)
    store.write_json(context.out / "report.json", values)
    return store.as_json(values)
