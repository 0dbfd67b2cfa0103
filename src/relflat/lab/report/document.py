"""A report as data, and what it is written as: an HTML page, Markdown, and an SVG file for each figure."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from relflat.lab.report.drawing import Paint, draw, inline
from relflat.plot.style import PALETTE

TEMPLATES = Environment(
    loader=PackageLoader("relflat.lab.report"),
    autoescape=select_autoescape(),  # whatever a page shows; Markdown has `as_text`
    trim_blocks=True,
    undefined=StrictUndefined,
)
TEMPLATES.filters["inline"] = inline
MARKUP = re.compile(r"[\\`*\[\]<>|~$&]|(?<!\w)_|_(?!\w)")  # what Markdown and its HTML would read


def as_text(text: str, *, begins: bool = False) -> str:
    """Text as Markdown shows it: on one line, with nothing read as markup; ``begins``: nor as what begins a block."""
    if begins and re.match(r"\s*([#+=-]|\d+[.)])", text):
        text = f"\N{ZERO WIDTH SPACE}{text}"
    return MARKUP.sub(
        lambda found: {"&": "&amp;", "<": "&lt;"}.get(found[0], "\\" + found[0]), " ".join(text.split())
    )


TEMPLATES.filters["as_text"] = as_text


@dataclass(frozen=True)
class Table:
    """A table with its title, and a note on how to read it."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A figure: what it shows, what fills its one pair of axes, and how to read it.

    Titles differ within a report, and say what is shown to readers who do not see it too.
    """

    title: str
    paint: Paint
    caption: str

    @cached_property
    def svg(self) -> str:
        """The text of its file."""
        return draw(self.paint, self.title)

    @property
    def file(self) -> str:
        """The name of its file."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-") + ".svg"


@dataclass(frozen=True)
class Section:
    """A part of a report; what it has is shown in this order: text, list, table, figures."""

    heading: str
    text: str = ""
    items: Sequence[str] = ()
    table: Table | None = None
    figures: Sequence[Figure] = ()


@dataclass(frozen=True)
class Document:
    """A report: title, what was run, its parts (the first says what came out), where it ran, and by what command."""

    title: str
    lead: str
    sections: Sequence[Section]
    environment: Mapping[str, Any]
    command: str = ""

    @property
    def where(self) -> str:
        """One line about the machine and the versions."""
        found = self.environment
        packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items() if version)
        return (
            f"{found['time']}, {found['processor']}, {found['cores']} cores, {found['device']}, "
            f"Python {found['python']}, {packages}."
        )

    def files(self) -> dict[str, str]:
        """The text of each of its files, by name; none needs a network."""
        forms = {name: TEMPLATES.get_template(name) for name in ("report.html", "report.md")}
        texts = {name: form.render(document=self, palette=PALETTE) for name, form in forms.items()}
        return texts | {figure.file: figure.svg for section in self.sections for figure in section.figures}
