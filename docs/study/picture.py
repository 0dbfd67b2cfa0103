"""Draws what arms buy and what their steps cost, from results.json: picture.svg, at the head of README.

    python docs/study/picture.py        # or: make results

It shows the comparisons whose arms had their usual settings (nothing searched: ``search_seeds`` is empty), and where
there is none, those of ``TUNED``. A point is an arm: the gain over plain training on the same seeds with its
interval, against the time of a step. Filled points differ from plain (Holm-corrected p below .05), hollow ones
are not shown to.
"""

import io
import json
import math
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from relflat.lab.compare.arms import ARMS
from relflat.plot.style import COLOURS, INK, PALETTE, STYLE

HERE = Path(__file__).parent
TUNED = ("fashion-mnist-4000-fresh", "digits-default")
ACROSS, WIDTH, HEIGHT = 3, 3.9, 2.9  # panels in a row, and their inches
LINE = 10.5  # points from one label to the next
GONE = {"fam-all": "FAM all layers"}  # titles of arms that are no longer there
TITLES = {
    "fashion-mnist-4000-noise": "Fashion-MNIST, 4,000 images, 20 % noise",
    "fashion-mnist-4000-clean": "Fashion-MNIST, 4,000 images",
    "digits-unshifted-noise-40": "digits, 40 % noise",
    "digits-unshifted-noise": "digits, 20 % noise",
    "digits-shifted-noise": "digits shifted at random, 20 % noise",
    "digits-unshifted-clean": "digits",
    "cifar10-5000-noise": "CIFAR-10, 5,000 images, 20 % noise",
    "cifar10-5000-clean": "CIFAR-10, 5,000 images",
    "mnist1d": "MNIST-1D",
    "breast-cancer": "a table: breast cancer",
}
Point = tuple[float, float, str, str, str]  # where, name, colour, weight
Box = tuple[float, float, float, float]


def comparisons(results: dict[str, Any]) -> dict[str, Any]:
    """Those to draw, by name."""
    untuned = {name: found for name, found in results.items() if found.get("search_seeds") == []}
    return untuned or {name: results[name] for name in TUNED}


def title(name: str, found: dict[str, Any]) -> str:
    """What was compared: the study, how many seeds, and plain training's accuracy."""
    plain = found["arms"]["plain"]
    name = name.rpartition("/")[2]
    return f"{TITLES.get(name, name)}\n{plain['n']} seeds, plain {100 * plain['accuracy']['value']:.1f} %"


def panel(axes: Axes, arms: dict[str, Any]) -> list[Point]:
    """A point for each arm; returns them, to be named once all panels have their limits."""
    points = []
    for name, arm in arms.items():
        if "gain" not in arm:  # plain, to which the others are compared
            axes.plot(1, 0, "o", color=INK, markersize=4)
            axes.annotate("plain", (1, 0), (1, 0), ("axes fraction", "data"), ha="right", va="bottom", size=8.5)
            continue
        gain = arm["gain"]
        across, low, up, high = arm["step"]["value"], *(100 * gain[key] for key in ("low", "value", "high"))
        colour = COLOURS[1] if name.startswith("fam") else COLOURS[2]
        filled = colour if gain["p"] < 0.05 else PALETTE["paper"][0]
        axes.plot([across, across], [low, high], color=colour, linewidth=1, alpha=0.6, zorder=2)
        axes.plot(across, up, "o", color=colour, markerfacecolor=filled, markersize=6, zorder=3)
        bold = "bold" if name.startswith("fam") else "normal"
        points.append((across, up, ARMS[name].title if name in ARMS else GONE.get(name, name), colour, bold))
    axes.axhline(0, color=INK, linewidth=0.8, zorder=1)
    return points


def name_points(axes: Axes, points: list[Point]) -> None:
    """Write names beside their points where they lie on nothing else; a thin line leads to those further away."""
    scale = 72 / axes.figure.dpi
    marks = [scale * axes.transData.transform(point[:2]) for point in points]
    taken = [(x - 5, x + 5, y - 5, y + 5) for x, y in marks]
    for (across, up, label, colour, weight), (x, y) in zip(points, marks, strict=True):
        long = 5.4 * len(label)
        places = (
            (side, dx, dy)
            for dy in (0, *(sign * LINE * k for k in range(1, 9) for sign in (1, -1)))
            for side, dx in (("left", 8 + abs(dy) / 3), ("right", -8 - abs(dy) / 3))
        )
        for side, dx, dy in places:
            left = x + dx - (long if side == "right" else 0)
            box = (left, left + long, y + dy - LINE / 2, y + dy + LINE / 2)
            inside = left > scale * axes.bbox.x0 and box[3] < scale * axes.bbox.y1
            if inside and not any(map(partial(overlap, box), taken)):
                break
        taken.append(box)
        look = {"size": 8.5, "color": colour, "weight": weight, "ha": side, "va": "center"}
        lead = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 4} if dy else None
        axes.annotate(label, (across, up), (dx, dy), textcoords="offset points", arrowprops=lead, **look)


def overlap(a: Box, b: Box) -> bool:
    """Whether two boxes (left, right, bottom, top) do."""
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]


def main(target: Path = HERE / "picture.svg") -> None:
    """Draw the picture."""
    found = comparisons(json.loads((HERE / "results.json").read_text()))
    found = dict(sorted(found.items(), key=lambda each: each[1]["arms"]["plain"]["accuracy"]["value"]))
    columns = 2 if len(found) == 4 else min(ACROSS, len(found))
    rows = math.ceil(len(found) / columns)
    with plt.rc_context(STYLE | {"svg.hashsalt": "picture", "axes.titlesize": "medium"}):
        size = (WIDTH * columns, HEIGHT * rows)
        figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey="row")
        figure.set_layout_engine("constrained")
        for axes in grid.flat[len(found) :]:
            axes.set_axis_off()
        points = []
        for place, (axes, (name, study)) in enumerate(zip(grid.flat, found.items(), strict=False)):
            axes.set_title(title(name, study), loc="left")
            axes.grid(visible=False, axis="x")
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
            axes.set_xlabel("time of a step, plain = 1")
            if place % columns == 0:
                axes.set_ylabel("gain over plain, points of accuracy")
            points.append(panel(axes, study["arms"]))
            far = max(point[0] for point in points[-1])
            axes.set_xlim(0.85, far + 0.5 * (far - 0.8))  # room for names
        for first in grid[:, 0]:
            bottom, top = first.get_ylim()
            first.set_ylim(bottom, top + 0.15 * (top - bottom))
        figure.canvas.draw()
        for axes, named in zip(grid.flat, points, strict=False):
            name_points(axes, sorted(named, reverse=True))
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    target.write_text(smaller(text.getvalue()))


def smaller(svg: str) -> str:
    """The same drawing in half the bytes: the font named once, numbers to a hundredth of a point."""
    font = re.search(r"font-family: [^;\"]*; ", svg)
    assert font is not None
    svg = svg.replace(font[0], "").replace("<svg ", f'<svg style="{font[0].strip()}" ', 1)
    svg = re.sub(
        r' transform="rotate\(-0 [^"]*\)"|<g id="[^"]*">(?=\s*<(?:path|g>|text))',
        lambda m: "<g>" * (m[0][0] == "<"),
        svg,
    )
    return re.sub(r"\n *", "\n", re.sub(r"(\.\d\d)\d+", r"\1", svg))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
