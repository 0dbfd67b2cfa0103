"""The table and the picture of ``cost.py``."""

from pathlib import Path
from typing import Any

COLUMNS = ("network", "step", "before", "wall", "processor", "ms", "FLOPs", "peak", "operations", "goal")


def cells_of(row: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """A line of the table: a row, and what it was before."""
    if "cannot_run" in row:
        return [row["case"], row["row"], "-", row["cannot_run"][:60], *[""] * 6]
    was = f"{old['wall']['ratio']:.2f}" if "wall" in old else ""
    count = f"{row['operations']:.0f}" if "operations" in row else f"error {row['median_error']:.1%}"
    numbers = [row["wall"], row["processor"]]
    return [
        row["case"],
        row["row"],
        was,
        *[f"{n['ratio']:.2f} [{n['low']:.2f}, {n['high']:.2f}]" for n in numbers],
        f"{1000 * row['wall']['seconds']:.2f}",
        f"{row['flops']:.2f}",
        f"{row['peak']:.2f}" if row.get("peak") else "",
        count,
        "" if row["goal"] is None else f"{row['goal']:g}",
    ]


def draw(rows: list[dict[str, Any]], old: dict[tuple[str, str], dict[str, Any]], path: Path) -> None:
    """A bar a row, with what it was before and the goal."""
    import matplotlib.pyplot as plt  # only where a picture is drawn

    shown = [row for row in rows if "wall" in row and row["row"] not in ("plain", "plain again")]
    figure, axes = plt.subplots(figsize=(8, 0.3 * len(shown) + 1))
    for place, row in enumerate(reversed(shown)):
        was = old.get((row["case"], row["row"]), {}).get("wall")
        if was is not None:
            axes.barh(place, was["ratio"], color="0.85")
        axes.barh(place, row["wall"]["ratio"], height=0.5)
        if row["goal"] is not None:
            axes.plot([row["goal"]] * 2, [place - 0.4, place + 0.4], color="black")
    axes.set_yticks(range(len(shown)), [f"{row['case']}: {row['row']}" for row in reversed(shown)])
    axes.set_xscale("log")
    axes.set_xlabel("times plain (grey: before; line: goal)")
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
