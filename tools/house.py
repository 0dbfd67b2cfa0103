"""What the source tree is like to live in, in numbers, and what in it breaks the project's limits.

python tools/house.py                                the tree beside this file
python tools/house.py --src OTHER/src/relflat        another one, older layouts too
python tools/house.py --json                         the same as JSON
"""

import argparse
import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from source_tree import GROUPS, Tree

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {
    "lines of core": 8059,  # may shrink, not grow: 4,500 is the aim
    "lines of lab + papers": 8463,
    "lines of a module": 350,
    "lines of a function": 45,  # without its docstring
    "branches of a function": 12,
    "parameters of a repeated signature": 6,
    "bytes outside src and tests": 2_000_000,
}
ONE_INTERFACE = {"vocabulary.blocks", "vocabulary.triton"}  # PyTorch's and Triton's form of the same functions


def spread(values: list[tuple[float, str]]) -> dict[str, Any]:
    """Median, 90 % quantile, and the largest with its name."""
    if not values:
        return {"count": 0, "median": 0, "90 %": 0, "most": 0, "where": ""}
    numbers = [v for v, _ in values]
    p90 = quantiles(numbers, n=10, method="inclusive")[-1] if len(numbers) > 1 else numbers[0]
    most, where = max(values)
    return {"count": len(values), "median": median(numbers), "90 %": round(p90), "most": most, "where": where}


def measures(tree: Tree, parts: tuple[str, ...]) -> dict[str, Any]:
    """Everything but lines and circles, of some parts."""
    modules, found = [m for m in tree.modules.values() if m.part in parts], tree.functions(parts)
    lines = max(1, sum(m.lines for m in modules))
    return {
        "modules": spread([(m.lines, m.name) for m in modules]),
        "functions, lines": spread([(f.lines, str(f)) for f in found]),
        "functions, branches": spread([(f.branches, str(f)) for f in found]),
        "functions, arguments": spread([(f.arguments, str(f)) for f in found]),
        "rooms": len({m.room for m in modules}),
        "arrows between modules": len(tree.arrows(rooms=False, late=True, parts=parts)),
        "arrows between rooms": len(tree.arrows(rooms=True, late=True, parts=parts)),
        "comment lines, %": round(100 * sum(m.comments for m in modules) / lines, 1),
        "docstring lines, %": round(100 * sum(m.docstrings for m in modules) / lines, 1),
    }


def tracked_bytes(root: Path) -> dict[str, int]:
    """Size of each tracked file outside src and tests; empty where there is no repository."""
    listed = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], capture_output=True, text=True, check=False)
    names = [n for n in listed.stdout.split("\0") if n and n.split("/")[0] not in ("src", "tests")]
    return {n: (root / n).stat().st_size for n in names if (root / n).is_file()}


def violations(tree: Tree, root: Path, limits: Mapping[str, int] = LIMITS) -> dict[str, list[str]]:
    """What breaks each limit, largest first."""
    lines, sizes = tree.lines(), tracked_bytes(root)

    def over(what: str, values: Iterable[tuple[int, Any]]) -> list[str]:
        most = limits[what]
        return [f"{name}: {v:,} > {most:,}" for v, name in sorted(values, key=lambda x: -x[0]) if v > most]

    largest = ", ".join(f"{n} {sizes[n] / 1e3:,.0f} kB" for n in sorted(sizes, key=lambda n: -sizes[n])[:5])
    return {
        "lines of core": over("lines of core", [(lines["core"], "core")]),
        "lines of lab + papers": over("lines of lab + papers", [(lines["lab + papers"], "lab + papers")]),
        "lines of a module": over("lines of a module", [(m.lines, m.name) for m in tree.modules.values()]),
        "lines of a function": over("lines of a function", [(f.lines, f) for f in tree.functions()]),
        "branches of a function": over("branches of a function", [(f.branches, f) for f in tree.functions()]),
        "repeated signatures": [
            f"{', '.join(map(str, group))}: all take ({', '.join(group[0].parameters)})"
            for group in tree.repeated(limits["parameters of a repeated signature"])
            if {f.module for f in group} != ONE_INTERFACE
        ],
        "circles between modules": [" <-> ".join(c) for c in tree.circles(rooms=False)],
        "circles between rooms": [_circle_of_rooms(tree, c) for c in tree.circles(rooms=True)],
        "bytes outside src and tests": over(
            "bytes outside src and tests", [(sum(sizes.values()), f"tracked files outside src and tests ({largest})")]
        ),
    }


def _circle_of_rooms(tree: Tree, rooms: list[str]) -> str:
    """The rooms of a circle, and one import of each pair of them."""
    rooms_of = {m.name: m.room for m in tree.modules.values()}
    by_pair: dict[tuple[str, str], list[str]] = {}
    for a, b in sorted(tree.arrows(rooms=False, late=False)):
        pair = (rooms_of[a], rooms_of[b])
        if pair[0] != pair[1] and set(pair) <= set(rooms):
            by_pair.setdefault(pair, []).append(f"{a} imports {b}")
    pairs = [f"{v[0]}" + (f" (and {len(v) - 1} more)" if v[1:] else "") for _, v in sorted(by_pair.items())]
    return f"{' <-> '.join(rooms)}: {'; '.join(pairs)}"


def report(tree: Tree, root: Path) -> dict[str, Any]:
    """All numbers and violations as plain values."""
    return {
        "lines": tree.lines(),
        **{group: measures(tree, parts) for group, parts in GROUPS.items()},
        "bytes outside src and tests": sum(tracked_bytes(root).values()),
        "violations": violations(tree, root),
    }


def show(found: Mapping[str, Any]) -> None:
    """Print a Markdown table, then the violations."""
    for part, count in found["lines"].items():
        print(f"lines of {part}: {count:,}")
    print(f"tracked bytes outside src and tests: {found['bytes outside src and tests']:,}\n")
    print("| | " + " | ".join(GROUPS) + " |\n|---|" + "---|" * len(GROUPS))
    for row, value in found["all"].items():
        cells = [found[group][row] for group in GROUPS]
        if isinstance(value, dict):
            cells = [f"{c['count']}: {c['median']:g}, {c['90 %']}, {c['most']} ({c['where']})" for c in cells]
            row += " (count: median, 90 %, most)"
        print(f"| {row} | " + " | ".join(map(str, cells)) + " |")
    for what, offenders in found["violations"].items():
        print(f"\n{what}: {len(offenders) or 'none'} over the limit")
        print("\n".join(f"  {o}" for o in offenders), end="\n" if offenders else "")


def main() -> None:
    """Print the report of one tree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src", type=Path, default=ROOT / "src" / "relflat", help="folder of the package")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    tree, root = Tree(options.src.resolve()), options.src.resolve().parents[1]
    found = report(tree, root)
    print(json.dumps(found, indent=2)) if options.json else show(found)


if __name__ == "__main__":
    main()
