"""The figures that several experiments have; `functools.partial` gives them their numbers, the report the axes."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from types import MappingProxyType
from typing import Any

from matplotlib.axes import Axes

from relflat.lab.report.drawing import DASHES, cloud, curves, every_few, legend
from relflat.plot.style import COLOURS, MARKERS, log_if_wide

__all__ = ["COLOURS", "DASHES", "MARKERS", "by_arm", "clouds", "curves", "every_few", "legend", "line", "log_if_wide"]


def clouds(
    groups: Mapping[str, Sequence[float]], gaps: Sequence[float], label: str, axes: Axes, *, first: int = 0
) -> None:
    """Paint the generalisation gap against one number of the same networks, a colour a group from ``first`` on."""
    for place, (name, values) in enumerate(groups.items(), first):
        cloud(axes, values, gaps, place, name)
    axes.set_xlabel(label)
    axes.set_ylabel("test loss − training loss")
    log_if_wide(axes, "x")
    legend(axes)


def line(axes: Axes, points: Sequence[tuple[float, float]], **look: Any) -> None:
    """Paint a line through points; nothing where there are none."""
    if points:
        axes.plot(*zip(*points, strict=True), **look)


def by_arm(
    groups: Mapping[str, Sequence[float]],
    label: str,
    axes: Axes,
    *,
    printed: Mapping[str, float] = MappingProxyType({}),
    first: int = 0,
) -> None:
    """Paint a mark a seed, seeds from left to right, by arm; a bar for the mean and a cross for the paper's.

    Colours are the arms' from ``first`` on; ``printed`` is the paper's number of the arms that it has.
    """
    for at, values in enumerate(groups.values()):
        if values:
            colour, step = COLOURS[first + at], 0.6 / max(5, len(values))
            across = [at + step * (seed - (len(values) - 1) / 2) for seed in range(len(values))]
            axes.plot(across, values, marker=MARKERS[first + at], linestyle="", markersize=5, color=colour)
            axes.hlines(fmean(values), at - 0.35, at + 0.35, linewidth=1.5, color=colour)
    crosses = [(at + 0.42, printed[name]) for at, name in enumerate(groups) if name in printed]
    line(axes, crosses, marker="x", linestyle="", color=COLOURS[0], label="the paper's")
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylabel(label)
    legend(axes)
