"""Tools to draw figures as SVG, for reports and for the papers' experiments.

A figure is drawn once, in the colours of a light page on white, as a file that any viewer shows. Inside an HTML page
the colours become CSS variables, so that the same drawing follows the page's light or dark mode. Text stays text, and
figures are small on purpose: a phone shows them at full size.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

if TYPE_CHECKING:  # else a circle: trials import tasks, those import papers, and these draw figures
    from relflat.lab.compare.trials import Trial

T = TypeVar("T")
Paint = Callable[[Axes], None]

# Colours in light and in dark mode. c0 to c5, the arms', start from the palette of Okabe and Ito (2008),
# https://jfly.uni-koeln.de/color/: under each kind of colour blindness (as simulated by Machado et al., 2009) any two
# are at least 17 apart in CIELAB, and each has a contrast of 3:1 or more with the page.
PALETTE = {
    "paper": ("#ffffff", "#15171a"),
    "ink": ("#1c1e21", "#e6e8eb"),
    "lines": ("#c9ced4", "#454b53"),
    "quiet": ("#5b626b", "#a2a9b2"),
    "box": ("#f3f5f7", "#1f2327"),
    "c0": ("#4d5661", "#e0e4e8"),
    "c1": ("#d55e00", "#f0803c"),
    "c2": ("#0072b2", "#3f9be8"),
    "c3": ("#009e73", "#2fc79a"),
    "c4": ("#d070a8", "#e078b8"),
    "c5": ("#7a4a00", "#f0e442"),
}
PAPER, INK, LINES, _, _, *COLOURS = (light for light, dark in PALETTE.values())
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", ":")
TEXT = 9.5  # points
WIDTH, HEIGHT, ROW = 4.7, 3.4, 0.19  # of a figure, and of a further row of its legend; inches
LEGEND = 290  # width for the legend, points: what the numbers beside the axes leave

STYLE = {
    "svg.fonttype": "none",
    "font.size": TEXT,
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "axes.edgecolor": LINES,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LINES,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.6,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("xtick.minor.size", "ytick.minor.size"), 0),
    "legend.frameon": False,
    "legend.fontsize": TEXT,
}


def draw(paint: Paint, label: str) -> str:
    """Let ``paint`` fill one pair of axes, and return the SVG file; the same drawing and label give the same text."""
    style: Any = STYLE | {"svg.hashsalt": label}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        paint(axes)
        if not math.isfinite(axes.dataLim.x0):
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, "nothing to show", transform=axes.transAxes, ha="center", va="center")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return re.sub('<g id="[^"]*">', "<g>", text.getvalue())  # the other ids are hashes, different in each figure


def inline(svg: str, label: str) -> Markup:
    """An SVG file as an element of a page: no prolog, the page's colours and width, and a label."""
    svg = svg[svg.index("<svg") :]
    for name, (light, _) in PALETTE.items():
        svg = svg.replace(light, f"var(--{name})")
    start, rest = svg.split(">", 1)
    start = re.sub(r' (?:width|height)="[^"]*"', "", start)
    return Markup('<svg role="img" aria-label="{}"').format(label) + Markup(f"{start[4:]}>{rest}")


def look(place: int) -> dict[str, Any]:
    """Colour of the arm at this place, as a keyword argument of matplotlib."""
    return {"color": COLOURS[place % len(COLOURS)]}


def dashes(place: int) -> str:
    """Line style of the arm at this place: arms of the same colour differ in it."""
    return DASHES[place // len(COLOURS) % len(DASHES)]


def marks(place: int) -> dict[str, Any]:
    """Marker of the arm at this place, as arguments of ``plot``: arms of one colour differ in shape and filling."""
    turn = place // len(COLOURS)
    hollow = {"markerfacecolor": "none"} if turn % 2 else {"markeredgewidth": 0}
    return {"marker": MARKERS[(place + turn) % len(MARKERS)], **hollow, **look(place)}


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
        finish(axes, labels, ("x", "y") if log else ())

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
    """Paint one number of the metrics by epoch or by time: mean over the seeds, band from lowest to highest.

    Args:
        groups: the tested runs of each arm, by title.
        key: name in the metrics.
        label: of the axis.
        error: show ``1 - value`` in percent.
        seconds: of a step of each arm; if given, the horizontal axis is training time.
    """

    def paint(axes: Axes) -> None:
        for place, (title, trials) in enumerate(groups.items()):
            runs = [every_few(trial.history) for trial in trials if trial.finished]
            if not runs:
                continue
            # files keep a number that was not finite as null; float makes it nan
            values = np.array([[record[key] for record in run] for run in runs], float)
            values = error_of(values) if error else values
            across = [record["epoch"] if seconds is None else record["steps"] * seconds[title] for record in runs[0]]
            axes.plot(across, values.mean(0), label=title, linestyle=dashes(place), **look(place))
            axes.fill_between(across, values.min(0), values.max(0), alpha=0.15, linewidth=0, **look(place))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=seconds is None, steps=(1, 2, 5, 10)))
        finish(axes, ("epoch" if seconds is None else "training time, s", label), ("y",))

    return paint


def error_of(score: Any) -> Any:
    """What a score, or an array of them, is short of 1, in percent."""
    return 100 * (1 - score)


def finish(axes: Axes, labels: tuple[str, str], log: Sequence[Literal["x", "y"]] = ()) -> None:
    """Name both axes, add the legend, and make the axes named in ``log`` logarithmic where that helps."""
    axes.set(xlabel=labels[0], ylabel=labels[1])
    for which in log:
        log_if_wide(axes, which)
    legend(axes)


def legend(axes: Axes) -> None:
    """Put the legend above the axes, where it hides nothing: as many columns as fit, read row by row."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    columns = columns_for(labels)
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


def columns_for(labels: Sequence[str]) -> int:
    """How many columns of a legend fit beside each other; one at the least."""
    widths = [TextPath((0, 0), label, size=TEXT).get_extents().width + 3.2 * TEXT for label in labels]
    fitting = (
        columns
        for columns in range(len(labels), 1, -1)
        if sum(max(widths[column::columns]) for column in range(columns)) <= LEGEND
    )
    return next(fitting, 1)


def log_if_wide(axes: Axes, which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic where its positive data span more than a factor of eight; say so."""
    low, high = getattr(axes.dataLim, f"interval{which}")
    if not (0 < low < high < math.inf and high / low > 8):
        return
    axis = {"x": axes.xaxis, "y": axes.yaxis}[which]
    axes.set(**{f"{which}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high / low < 1000 else LogLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, place: short(value)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_label_text(f"{axis.get_label_text()} (log)")


def short(value: float) -> str:
    """A number beside an axis: thousands as k from 10,000 on, powers of ten from a million on."""
    return f"{value / 1000:g}k" if 1e4 <= value < 1e6 else f"{value:g}"
