"""Tables for a terminal and for a notebook."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relflat.result import Flatness

COLUMNS = ("layer", "kappa", "± standard error", "share", "Tr H", "||W||", "method")
_LEFT = {"layer", "measure", "method"}  # columns of words


def rows_of(flats: Mapping[str, "Flatness"]) -> list[tuple[str, ...]]:
    """A row for each layer, in the order of `COLUMNS`; shares of the sum where none is negative."""
    total = sum(abs(f.value) for f in flats.values())
    shared = total > 0 and min(f.value for f in flats.values()) >= 0
    return [
        (
            name or "(the model)",
            f"{f.value:.5g}",
            f"{f.stderr:.2g}" if f.stderr else "exact",
            f"{f.value / total:.1%}" if shared else "-",
            f"{f.trace:.4g}",
            f"{f.weight_norm:.4g}",
            f.method,
        )
        for name, f in flats.items()
    ]


def about(flats: Mapping[str, "Flatness"]) -> str:
    """What all layers were measured on; "" without any."""
    for f in flats.values():
        confidence = "" if f.confidence is None else f", confidence {f.confidence:.4f}"
        return f"{f.curvature}, loss {f.loss:.5g}{confidence}, n={f.samples}"
    return ""


def as_text(columns: Sequence[str], rows: Iterable[Sequence[str]], below: str = "") -> str:
    """Columns lined up: words to the left, numbers to the right."""
    cells = [list(columns), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    pads = ["<" if name in _LEFT else ">" for name in columns]
    lines = ["  ".join(f"{c:{p}{w}}" for c, p, w in zip(row, pads, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([*lines, *([below] if below else [])])


def as_html(columns: Sequence[str], rows: Iterable[Sequence[str]], below: str = "") -> str:
    """The same as an element of a page, which takes its look from there."""
    sides = ["left" if name in _LEFT else "right" for name in columns]

    def row(kind: str, cells: Sequence[str]) -> str:
        inside = (f'<{kind} style="text-align: {s}">{escape(c)}</{kind}>' for c, s in zip(cells, sides, strict=True))
        return f"<tr>{''.join(inside)}</tr>"

    body = "".join(row("td", cells) for cells in rows)
    table = f"<table><thead>{row('th', columns)}</thead><tbody>{body}</tbody></table>"
    return f'<div>{table}<p style="max-width: 48em">{escape(below)}</p></div>' if below else table
