"""Runs a part of the study again and holds every gain against the interval that was printed: make study-small.

    python docs/study/repeat.py                          the comparisons on digits, each in some minutes
    python docs/study/repeat.py untuned/mnist1d          another one, by its name in results.json

A comparison is run by the command that stands beside its numbers, on the same seeds, so that on the same machine and
versions they are the same; elsewhere they should lie within their intervals. Exits with 1 where one does not. Runs
are kept in build/study: interrupted, the same command goes on.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from collect import entry

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "build" / "study"
PARTS = "untuned/digits"


def again(name: str, command: str) -> dict[str, Any]:
    """The arms of a comparison, run again."""
    out = FOLDER / name
    words = shlex.split(command)[1:]
    if "--workers" in words:  # as many as there are cores for
        at = words.index("--workers")
        words = words[:at] + words[at + 2 :]
    relflat = [sys.executable, "-m", "relflat", *words]
    subprocess.run([*relflat, "--runs", str(FOLDER / "runs"), "--out", str(out)], cwd=ROOT, check=True)
    arms: dict[str, Any] = entry(json.loads((out / "report.json").read_text()))["arms"]
    return arms


def compared(printed: dict[str, Any], found: dict[str, Any]) -> Iterator[tuple[str, dict[str, float], float, bool]]:
    """Each arm with its printed gain, the one found now, and whether that is within the interval."""
    for name, arm in printed.items():
        if "gain" in arm:
            gain = found[name]["gain"]["value"]
            yield name, arm["gain"], gain, arm["gain"]["low"] <= gain <= arm["gain"]["high"]


def main(*names: str) -> int:
    """Run, print, and say how many gains are outside."""
    results = json.loads((HERE / "results.json").read_text())
    outside = 0
    for name in names or [name for name in results if name.startswith(PARTS)]:
        found = again(name, results[name]["command"])
        print(f"\n{name}, points over plain\n{'arm':14s}{'printed':>10s}{'interval':>18s}{'now':>8s}")
        for arm, gain, now, within in compared(results[name]["arms"], found):
            low, value, high, repeated = (100 * x for x in (gain["low"], gain["value"], gain["high"], now))
            interval = f"{low:+.1f} to {high:+.1f}"
            print(f"{arm:14s}{value:+10.2f}{interval:>18s}{repeated:+8.2f}{'' if within else '   outside'}")
            outside += not within
    print(f"\n{outside} outside their intervals" if outside else "\nall within their intervals")
    return int(outside > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
