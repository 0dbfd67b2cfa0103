"""What an experiment is, what it is given, and what it hands back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from relflat.lab.report.document import Figure as Figure
from relflat.lab.report.document import Table as Table

Scale = Literal["small", "paper"]


@dataclass(frozen=True)
class Outcome:
    """What came out.

    Attributes:
        findings: plain sentences; "not reproduced" is one of the things they may say.
        tables: the numbers that matter.
        figures: the same to look at.
        scaled: what differs from the paper, and why.
        data: all numbers, as JSON can hold them.
    """

    findings: list[str]
    tables: list[Table]
    figures: list[Figure]
    scaled: list[str]
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Context:
    """What an experiment runs with.

    Attributes:
        scale: ``"small"`` fits two cores in minutes; ``"paper"`` uses the paper's numbers.
        out: folder of the report.
        runs: folder that keeps trainings and other results worth keeping.
        workers: processes, one thread each.
        on_progress: told in a line what has been done.
    """

    scale: Scale
    out: Path
    runs: Path
    workers: int = 1
    on_progress: Callable[[str], None] = lambda line: None

    def counter(self, what: str, total: int) -> Callable[[object], None]:
        """A function to call after each one is done; it tells how many are, out of how many."""
        numbers = count(1)
        return lambda each: self.on_progress(f"{next(numbers)} of {total} {what}")


@dataclass(frozen=True)
class Experiment:
    """One table or figure of a paper, as code.

    Attributes:
        name: on the command line.
        summary: one line for lists.
        paper: what the paper reports, with its numbers and the place.
        run: does it; what is kept in ``Context.runs`` is not done twice.
    """

    name: str
    summary: str
    paper: str
    run: Callable[[Context], Outcome]
