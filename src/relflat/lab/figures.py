"""Figures as inline SVG that follow the page's light or dark mode.

matplotlib draws with placeholder colours; each is then replaced by a CSS variable, so one drawing
serves both modes and its text stays text. Figures are small on purpose: a phone shows them at full size.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from relflat.lab.trials import Trial

INK, LINES = "#010101", "#020202"
STYLE: dict[str, tuple[str, str]] = {
    "plain": ("#0a0101", "o"),
    "sam": ("#0a0202", "s"),
    "fam": ("#0a0303", "^"),
}
VARIABLES = {INK: "--ink", LINES: "--lines", **{colour: f"--{name}" for name, (colour, _) in STYLE.items()}}
TITLES = {"plain": "plain", "sam": "SAM", "fam": "FAM"}

RC = {
    "svg.fonttype": "none",
    "font.size": 9.5,
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
    "legend.fontsize": 9.5,
}


def draw(paint: Callable[[Axes], None], label: str) -> str:
    """Let ``paint`` fill one pair of axes and return the drawing as an SVG element.

    Args:
        paint: draws.
        label: what the figure shows, for readers who do not see it.
    """
    style: Any = RC | {"svg.hashsalt": label}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.7, 3.4), layout="constrained")
        paint(figure.add_subplot())
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


def curves(
    finals: Mapping[str, Sequence[Trial]], key: str, label: str, *, error: bool = False
) -> Callable[[Axes], None]:
    """Paint one number of the metrics by epoch: mean over the seeds, band from lowest to highest.

    Args:
        finals: the tested runs of each method.
        key: name in the metrics.
        label: of the axis.
        error: show ``1 - value`` in percent.
    """

    def paint(axes: Axes) -> None:
        for method, trials in finals.items():
            colour, _ = STYLE[method]
            runs = [[record[key] for record in trial.history] for trial in trials if trial.finished]
            if error:
                runs = [[100 * (1 - value) for value in run] for run in runs]
            if not runs:
                continue
            epochs = range(1, len(runs[0]) + 1)
            by_epoch = list(zip(*runs, strict=True))
            axes.plot(epochs, [fmean(values) for values in by_epoch], color=colour, label=TITLES[method])
            low, high = [min(values) for values in by_epoch], [max(values) for values in by_epoch]
            axes.fill_between(epochs, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        log_if_wide(axes, "y")
        legend(axes)

    return paint


def kappa_against_error(groups: Mapping[str, Sequence[Trial]], split: str) -> Callable[[Axes], None]:
    """Paint one point a run: kappa of the output layer against the error on one split.

    Args:
        groups: runs of each method.
        split: ``"validation"`` or ``"test"``.
    """

    def paint(axes: Axes) -> None:
        for method, trials in groups.items():
            colour, marker = STYLE[method]
            done = [trial.result for trial in trials if trial.finished]
            kappas = [result["flatness"]["value"] for result in done]
            errors = [100 * (1 - result[split]["accuracy"]) for result in done]
            axes.scatter(
                kappas,
                errors,
                color=colour,
                marker=marker,
                s=34,
                alpha=0.85,
                linewidth=0,
                label=TITLES[method],
            )
        axes.set_xlabel("kappa of the output layer, training data")
        axes.set_ylabel(f"{split} error, %")
        log_if_wide(axes, "x")
        log_if_wide(axes, "y")
        legend(axes)

    return paint


def legend(axes: Axes) -> None:
    """Put the legend above the axes, where it hides nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0, handletextpad=0.4)


def log_if_wide(axes: Axes, which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic where its positive data span more than a factor of eight; say so."""
    low, high = getattr(axes.dataLim, f"interval{which}")
    if not (low > 0 and high / low > 8):
        return
    axis = {"x": axes.xaxis, "y": axes.yaxis}[which]
    axes.set(**{f"{which}scale": "log"})
    if high / low < 1000:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axis.set_major_locator(LogLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_label_text(f"{axis.get_label_text()} (log)")
