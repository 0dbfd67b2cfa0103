"""What the file of an experiment says: the paper's numbers, sizes, grids, titles and sentences.

One TOML file an experiment, in the folder ``sheets``. Braces in its texts are filled in by `str.format`.
"""

import tomllib
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from typing import Any, TypeVar

from matplotlib.axes import Axes

from relflat.papers.experiment import Figure, Scale, Table

T = TypeVar("T")


class Sheet:
    """The content of the file of one experiment."""

    def __init__(self, name: str) -> None:
        text = files(__package__).joinpath("sheets", f"{name}.toml").read_text(encoding="utf-8")
        self._values = with_tuples(tomllib.loads(text))

    def __getitem__(self, key: str) -> Any:
        """What stands under a key."""
        return self._values[key]

    def sizes(self, make: Callable[..., T]) -> dict[Scale, T]:
        """What is run at each scale, built from ``[sizes.small]`` and ``[sizes.paper]``."""
        return {scale: make(**self["sizes"][scale]) for scale in ("small", "paper")}

    def say(self, key: str, **values: Any) -> str:
        """A sentence of ``[text]`` with these values."""
        return str(self["text"][key].format(**values))

    def differs(self, scale: Scale, **values: Any) -> list[str]:
        """What differs from the paper: at any scale first, then at this one."""
        lines = self["differs"]
        return [line.format(**values) for line in (*lines.get("always", ()), *lines.get(scale, ()))]

    def table(self, key: str, rows: Iterable[Sequence[str]], columns: Sequence[str] = (), **values: Any) -> Table:
        """A table of ``[tables]`` with these rows, more columns after its own, and its texts with these values."""
        found = self["tables"][key]
        title, note = (found.get(part, "").format(**values) for part in ("title", "note"))
        return Table(title, (*found["headings"], *columns), tuple(map(tuple, rows)), note)

    def figure(self, key: str, paint: Callable[[Axes], None], **values: Any) -> Figure:
        """A figure of ``[figures]``; its texts with these values."""
        title, caption = (self["figures"][key][part].format(**values) for part in ("title", "caption"))
        return Figure(title, paint, caption)


def with_tuples(value: Any) -> Any:
    """The same values with every list as a tuple."""
    if isinstance(value, dict):
        return {key: with_tuples(each) for key, each in value.items()}
    return tuple(map(with_tuples, value)) if isinstance(value, list) else value
