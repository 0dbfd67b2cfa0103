"""What people see: tables and messages on a terminal, one JSON object with ``--json``."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch.utils.data import DataLoader

from relflat.lab.common.jsonable import finite

out = Console(markup=False, emoji=False)
err = Console(stderr=True, markup=False, emoji=False)
_WIDE = 10_000


@contextmanager
def aside() -> Iterator[None]:
    """Send to stderr what is printed meanwhile, by a task's file, Ray or a program they start: it is no answer."""
    with ExitStack() as back:
        if sys.stdout is sys.__stdout__:  # and not something that stands in for it
            print(end="", flush=True)
            kept = os.dup(1)
            back.callback(os.close, kept)
            back.callback(os.dup2, kept, 1)
            os.dup2(2, 1)
        back.enter_context(redirect_stdout(sys.stderr))
        yield


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object to stdout and nothing else; numbers that are not finite become null."""
    print(json.dumps(finite(value), indent=2))


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table to stdout; in a file or a pipe as wide as it is, so that a line of it is a row."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    (out if out.is_terminal else Console(width=_WIDE, markup=False, emoji=False)).print(table)


def say(line: str) -> None:
    """Print a line to stderr, where it never mixes with results."""
    err.print(line, highlight=False, markup=False)


def fail(error: Exception | str) -> None:
    """Print an error that the user can do something about."""
    err.print(Text.assemble(("error:", "bold red"), f" {error}"), soft_wrap=True)


def bar_of(columns: Iterable[ProgressColumn], *, shown: bool) -> Progress:
    """A progress bar on stderr; where it is not shown it prints nothing, and no new line as rich before 14.3 does."""
    console = err if shown else Console(stderr=True, quiet=True)
    return Progress(*columns, console=console, disable=not shown, transient=True)


@contextmanager
def progress(epochs: int, metric: str, *, shown: bool) -> Iterator[Any]:
    """A progress bar over epochs on stderr, if that is a terminal; gives what to call with each epoch's record."""
    columns = (
        TextColumn("epoch {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with bar_of(columns, shown=shown and sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=epochs, note="")

        def on_epoch(record: Mapping[str, Any]) -> None:
            note = f"loss {record['loss']:.4f}  kappa {record['kappa']:.4g}"
            note += f"  validation {record[f'validation_{metric}']:.2%}"
            bar.update(task, completed=record["epoch"], note=note)

        yield on_epoch


class Watched:
    """Batches that a progress bar counts as they are done, from nothing for each pass over them."""

    def __init__(self, data: "list[Any] | DataLoader[Any]", bar: Progress, task: TaskID, title: str) -> None:
        self.data, self.bar, self.task, self.title = data, bar, task, title

    def __iter__(self) -> Iterator[Any]:
        self.bar.reset(self.task, total=len(self.data), description=self.title)
        for batch in self.data:
            yield batch
            self.bar.advance(self.task)


@contextmanager
def watching() -> Iterator[Callable[..., Any]]:
    """A progress bar over batches on stderr, if that is a terminal; gives what data are put through, with a title."""
    batch = TextColumn("batch {task.completed}/{task.total}")
    columns = (TextColumn("measuring{task.description}"), BarColumn(), batch, TimeRemainingColumn())
    shown = sys.stderr.isatty()
    with bar_of(columns, shown=shown) as bar:
        task = bar.add_task("", total=None)

        def watched(data: Any, title: str = "") -> Any:
            return Watched(data, bar, task, title) if shown and isinstance(data, list | DataLoader) else data

        yield watched
