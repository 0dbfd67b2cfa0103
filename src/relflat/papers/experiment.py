"""What an experiment is, what it is given, and what it hands back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from relflat.lab.report.document import Figure as Figure
from relflat.lab.report.document import Table as Table

Scale = Literal["small", "paper"]  # two cores in minutes, or the paper's numbers


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
