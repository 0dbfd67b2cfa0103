"""Tools to draw figures as SVG, for reports and for the papers' experiments.

A figure is drawn once, in the colours of a light page on white, as a file that any viewer shows. Inside an HTML page
the colours become CSS variables, so that the same drawing follows the page's light or dark mode. Text stays text, and
figures are small on purpose: a phone shows them at full size.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator

from relflat.plot.style import COLOURS, MARKERS, PALETTE, STYLE, log_if_wide

if TYPE_CHECKING:  # else a circle: trials import tasks, those import papers, and these draw figures
    from relflat.lab.compare.trials import Trial

T = TypeVar("T")
Paint = Callable[[Axes], None]

DASHES = ("-", "--", ":")
TEXT = STYLE["font.size"]  # points
WIDTH, HEIGHT, ROW = 4.7, 3.4, 0.19  # of a figure, and of a further row of its legend; inches
LEGEND = 290  # width for the legend, points: what the numbers beside the axes leave


def draw(paint: Paint, label: str) -> str:
    """Let ``paint`` fill one pair of axes, and return the SVG file; the same drawing and label give the same text."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": label}):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        paint(axes)
        if not math.isfinite(axes.dataLim.x0):
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, "nothing to show", transform=axes.transAxes, ha="center", va="center")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = re.sub(r"(\.\d\d)\d+", r"\1", text.getvalue())  # hundredths of a point are enough
    return re.sub('<g id="[^"]*">', "<g>", svg)  # the other ids are hashes, different in each figure


def inline(svg: str, label: str) -> Markup:
    """An SVG file as an element of a page: no prolog, the page's colours and width, and a label."""
    svg = svg[svg.index("<svg") :]
    for name, (light, _) in PALETTE.items():
        svg = svg.replace(light, f"var(--{name})")
    start, rest = svg.split(">", 1)
    start = re.sub(r' (?:width|height)="[^"]*"', "", start)
    return Markup('<svg role="img" aria-label="{}"').format(label) + Markup(f"{start[4:]}>{rest}")


def dashes(place: int) -> str:
    """Line style of the arm at this place: arms of the same colour differ in it."""
    return DASHES[place // len(COLOURS) % len(DASHES)]


def marks(place: int) -> dict[str, Any]:
    """Marker of the arm at this place, as arguments of ``plot``: arms of one colour differ in shape and filling."""
    turn, colour = divmod(place, len(COLOURS))
    hollow = {"markerfacecolor": "none"} if turn % 2 else {"markeredgewidth": 0}
    return {"marker": MARKERS[(place + turn) % len(MARKERS)], **hollow, "color": COLOURS[colour]}


def cloud(axes: Axes, across: Sequence[float], up: Sequence[float], place: int, label: str, line: str = "") -> None:
    """Add a marker for each pair of numbers, in the look of the arm at this place, joined by this style of line."""
    axes.plot(across, up, linestyle=line, markersize=5.5, alpha=0.85, label=label, **marks(place))


def points(
    groups: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    labels: tuple[str, str],
    *,
    joined: bool = False,
    log: bool = False,
) -> Paint:
    """Paint pairs of numbers of each arm, a marker each, joined by lines or not; an empty group is left out."""

    def paint(axes: Axes) -> None:
        for place, (title, (across, up)) in enumerate(groups.items()):
            if len(across):
                cloud(axes, across, up, place, title, dashes(place) if joined else "")
        axes.set(xlabel=labels[0], ylabel=labels[1])
        if log:
            log_if_wide(axes, "x")
            log_if_wide(axes, "y")
        legend(axes)

    return paint


def every_few(history: Sequence[T], most: int = 200) -> Sequence[T]:
    """At most so many entries, evenly spread up to the last one: a figure has no more pixels to show them."""
    stride = -(-len(history) // most) or 1
    return history[::-1][::stride][::-1]


def curves(
    groups: "Mapping[str, Sequence[Trial]]",
    key: str,
    label: str,
    *,
    error: bool = False,
    seconds: Mapping[str, float] | None = None,
) -> Paint:
    """Paint one number of the metrics by epoch: mean over the seeds, band from lowest to highest.

    With ``error`` it is ``1 - value`` in percent; with the seconds of a step of each arm it is by training time.
    """

    def paint(axes: Axes) -> None:
        for place, (title, trials) in enumerate(groups.items()):
            runs = [every_few(trial.history) for trial in trials if trial.finished]
            if not runs:
                continue
            # files keep a number that was not finite as null; float makes it nan
            values = np.array([[record[key] for record in run] for run in runs], float)
            values = 100 * (1 - values) if error else values
            across = [record["epoch"] if seconds is None else record["steps"] * seconds[title] for record in runs[0]]
            colour = COLOURS[place % len(COLOURS)]
            axes.plot(across, values.mean(0), label=title, linestyle=dashes(place), color=colour)
            axes.fill_between(across, values.min(0), values.max(0), alpha=0.15, linewidth=0, color=colour)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=seconds is None, steps=(1, 2, 5, 10)))
        axes.set(xlabel="epoch" if seconds is None else "training time, s", ylabel=label)
        log_if_wide(axes, "y")
        legend(axes)

    return paint


def legend(axes: Axes) -> None:
    """Put the legend above the axes, where it hides nothing: as many columns as fit, read row by row."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    widths = [TextPath((0, 0), label, size=TEXT).get_extents().width + 3.2 * TEXT for label in labels]
    columns = len(labels)
    while columns > 1 and sum(max(widths[column::columns]) for column in range(columns)) > LEGEND:
        columns -= 1
    # matplotlib fills a legend column by column
    by_column = [place for column in range(columns) for place in range(column, len(labels), columns)]
    axes.legend(
        [handles[place] for place in by_column],
        [labels[place] for place in by_column],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        borderaxespad=0,
        handletextpad=0.4,
        handlelength=1.6,
        columnspacing=1.2,
    )
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.set_figheight(HEIGHT + ROW * (math.ceil(len(labels) / columns) - 1))
