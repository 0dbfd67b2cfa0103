"""Results as a table on the terminal and as JSON beside the environment they were taken in."""

import json
import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from relflat.lab.train.environment import describe

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Versions, machine and threads; the commit, whether ``src`` differs from it, and the load before the run."""
    return describe() | {
        "commit": _git("rev-parse", "HEAD"),
        "src_modified": bool(_git("status", "--porcelain", "--", "src")),
        "load_average": os.getloadavg(),
    }


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip()


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, all at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(content, indent=2) + "\n")
    draft.replace(path)


def show(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.width = max(console.width, 160)
    console.print(table)
