"""Figures as inline SVG that follow the page's light or dark mode.

matplotlib draws with placeholder colours; each is then replaced by a CSS variable, so one drawing
serves both modes and its text stays text. Figures are small on purpose: a phone shows them at full size.
"""

import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, Literal, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from relflat.lab.compare.trials import Trial

T = TypeVar("T")

Runs = Mapping[str, Sequence[Trial]]
Record = Mapping[str, Any]

INK, LINES = "#010101", "#020202"
COLOURS = tuple(f"#0a01{place:02x}" for place in range(1, 7))
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", ":")
TEXT = 9.5  # points
WIDTH, HEIGHT, ROW = 4.7, 3.4, 0.19  # of a figure, and of a further row of its legend; inches
LEGEND = 290  # width for the legend, points: what the numbers beside the axes leave
VARIABLES = {INK: "--ink", LINES: "--lines", **{colour: f"--c{n}" for n, colour in enumerate(COLOURS)}}

RC = {
    "svg.fonttype": "none",
    "font.size": TEXT,
    "axes.edgecolor": LINES,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LINES,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": TEXT,
}


def draw(paint: Callable[[Axes], None], label: str) -> str:
    """Let ``paint`` fill one pair of axes and return the drawing as an SVG element.

    Args:
        paint: draws.
        label: what the figure shows, for readers who do not see it.
    """
    style: Any = RC | {"svg.hashsalt": label}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        paint(axes)
        if not math.isfinite(axes.dataLim.x0):
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, "nothing to show", transform=axes.transAxes, ha="center", va="center")
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return inline(text.getvalue(), label)


def inline(svg: str, label: str) -> str:
    """Make a standalone SVG file into an element of a page: no prolog, CSS colours, own ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    prefix = re.sub(r"\W+", "-", label.lower())
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'(href="#|url\(#)([^")]+)', rf"\1{prefix}-\2", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def captioned(paint: Callable[[Axes], None], title: str, caption: str) -> str:
    """The drawing as a figure of a page, its title and how to read it below.

    Args:
        paint: draws.
        title: what the figure shows.
        caption: how to read it.
    """
    text = f"<strong>{html.escape(title)}.</strong> {html.escape(caption)}"
    return f"<figure>{draw(paint, title)}<figcaption>{text}</figcaption></figure>"


def look(place: int) -> dict[str, Any]:
    """Colour of the arm at this place, as a keyword argument of matplotlib."""
    return {"color": COLOURS[place % len(COLOURS)]}


def dashes(place: int) -> str:
    """Line style of the arm at this place: arms of the same colour differ in it."""
    return DASHES[place // len(COLOURS) % len(DASHES)]


def marks(place: int) -> dict[str, Any]:
    """Marker of the arm at this place, as arguments of ``plot``: of arms of the same colour every other is hollow."""
    hollow = {"markerfacecolor": "none"} if place // len(COLOURS) % 2 else {"markeredgewidth": 0}
    return {"marker": MARKERS[place % len(MARKERS)], **hollow, **look(place)}


def cloud(axes: Axes, across: Sequence[float], up: Sequence[float], place: int, label: str) -> None:
    """Add one point for each pair of numbers.

    Args:
        axes: to paint on.
        across: horizontal.
        up: vertical.
        place: of the group, for its colour and marker.
        label: of the group.
    """
    axes.plot(across, up, linestyle="", markersize=5.5, alpha=0.85, label=label, **marks(place))


def error_of(score: float) -> float:
    """What a score is short of 1, in percent."""
    return 100 * (1 - score)


def known(value: float | None) -> float:
    """A number of the metrics; nan for one that was not finite, which files keep as null."""
    return math.nan if value is None else value


def every_few(history: Sequence[T], most: int = 200) -> Sequence[T]:
    """At most so many entries, evenly spread up to the last one: a figure has no more pixels to show them."""
    stride = -(-len(history) // most) or 1
    return history[::-1][::stride][::-1]


def curves(
    groups: Runs,
    key: str,
    label: str,
    *,
    error: bool = False,
    seconds: Mapping[str, float] | None = None,
) -> Callable[[Axes], None]:
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
            values = [
                [error_of(known(line[key])) if error else known(line[key]) for line in run] for run in runs
            ]
            by_epoch = list(zip(*values, strict=True))
            across = [
                line["epoch"] if seconds is None else line["steps"] * seconds[title] for line in runs[0]
            ]
            means = [fmean(column) for column in by_epoch]
            axes.plot(across, means, label=title, linestyle=dashes(place), **look(place))
            low, high = [min(column) for column in by_epoch], [max(column) for column in by_epoch]
            axes.fill_between(across, low, high, alpha=0.15, linewidth=0, **look(place))
        axes.set_xlabel("epoch" if seconds is None else "training time, s")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_ylabel(label)
        log_if_wide(axes, "y")
        legend(axes)

    return paint


def scatter(groups: Runs, height: Callable[[Record], float], label: str) -> Callable[[Axes], None]:
    """Paint one point a run: kappa against another number of its result.

    Args:
        groups: runs of each arm, by title.
        height: the other number.
        label: of its axis.
    """

    def paint(axes: Axes) -> None:
        for place, (title, trials) in enumerate(groups.items()):
            done = [trial.result for trial in trials if trial.finished]
            if done:
                kappas = [result["flatness"]["value"] for result in done]
                cloud(axes, kappas, [height(result) for result in done], place, title)
        axes.set_xlabel("kappa, training data")
        axes.set_ylabel(label)
        log_if_wide(axes, "x")
        log_if_wide(axes, "y")
        legend(axes)

    return paint


def sweep(scores: Mapping[str, Sequence[float]], label: str) -> Callable[[Axes], None]:
    """Paint the validation error of each setting of the search, from an arm's first value to its last.

    Args:
        scores: mean validation scores of the settings of each arm, by title; nan where one diverged.
        label: of the axis.
    """

    def paint(axes: Axes) -> None:
        for place, (title, values) in enumerate(scores.items()):
            if all(map(math.isnan, values)):
                continue
            errors = [error_of(value) for value in values]
            axes.plot(range(1, len(values) + 1), errors, linestyle=dashes(place), label=title, **marks(place))
        axes.set_xlabel("place in the arm's grid")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend(axes)

    return paint


def reliability(bins: Mapping[str, Sequence[Sequence[float]]]) -> Callable[[Axes], None]:
    """Paint accuracy against confidence on the test split; the diagonal is perfect calibration.

    Args:
        bins: (share, confidence, accuracy) of each bin, by title of the arm.
    """

    def paint(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=LINES, linewidth=1)
        for place, (title, rows) in enumerate(bins.items()):
            if not rows:
                continue
            axes.plot(
                [confidence for _, confidence, _ in rows],
                [accuracy for _, _, accuracy in rows],
                markersize=4,
                linestyle=dashes(place),
                label=title,
                **marks(place),
            )
        axes.set_xlabel("confidence")
        axes.set_ylabel("share that is right, test")
        legend(axes)

    return paint


def legend(axes: Axes) -> None:
    """Put the legend above the axes, where it hides nothing: as many columns as fit, read row by row."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    columns = columns_for(labels)
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
    if high / low < 1000:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axis.set_major_locator(LogLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, place: short(value)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_label_text(f"{axis.get_label_text()} (log)")


def short(value: float) -> str:
    """A number beside an axis: thousands as k from 10,000 on, powers of ten from a million on."""
    return f"{value / 1000:g}k" if 1e4 <= value < 1e6 else f"{value:g}"
