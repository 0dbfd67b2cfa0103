"""The road from module to module during one call of FAM on a hidden layer: of its ``Scene``, and of all calls.

    PYTHONPATH=src python tools/road.py
    PYTHONPATH=OTHER/src python tools/road.py --json

A module is on the road of the scene when one of its functions is called with a ``Scene`` among its arguments or in
its closure (or a generator that holds one goes on), and on the road of all calls when any of its functions is called.
Consecutive calls of one module are one stay; a return is a stay in a module where the road was before. The class
is found by its name, so any layout of the package will do.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import nn

from relflat import FAM

CLASS, PACKAGE = "Scene", "relflat."
WAYS: dict[str, dict[str, Any]] = {
    "ggn": {},
    "hessian": {"curvature": "hessian"},
    "exact": {"curvature": "hessian", "method": "exact"},
    "normalised": {"normalize_features": True},
}
Calls = list[tuple[str, str]]


def roads(step: Callable[[], Any]) -> tuple[Calls, Calls]:
    """Module and function of each call within the package, in order: those handed a scene, and all."""
    handed: Calls = []
    every: Calls = []

    def look(frame: FrameType, event: str, _: Any) -> None:
        module = frame.f_globals.get("__name__", "")
        generated = frame.f_code.co_filename.startswith("<")  # methods that dataclass writes
        if event != "call" or not module.startswith(PACKAGE) or generated:
            return
        call = module.removeprefix(PACKAGE), frame.f_code.co_qualname
        every.append(call)
        if any(type(value).__name__ == CLASS for value in frame.f_locals.values()):
            handed.append(call)

    sys.setprofile(look)
    try:
        step()
    finally:
        sys.setprofile(None)
    return handed, every


def summary(calls: Calls) -> dict[str, Any]:
    """The stays in order, and how many calls, stays, modules and returns there are."""
    found = [m for i, (m, _) in enumerate(calls) if i == 0 or calls[i - 1][0] != m]
    distinct = len(set(found))
    counts = {"calls": len(calls), "stays": len(found), "modules": distinct, "returns": len(found) - distinct}
    return {**counts, "road": found}


def call_of_fam(**options: Any) -> Callable[[], Any]:
    """The call of the criterion after a forward pass of a small network, the second one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    criterion = FAM(nn.CrossEntropyLoss(), model, "0", strength=0.1, **options)
    with warnings.catch_warnings(action="ignore"):  # kappa of an untrained network may be negative
        criterion(model(x), y).backward()
    outputs = model(x)

    def step() -> Any:
        assert model.training  # the criterion holds its model weakly
        return criterion(outputs, y)

    return step


def main() -> None:
    """Print the roads and how long they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--calls", action="store_true", help="print every call that is handed a scene")
    options = parser.parse_args()
    found = {}
    for way, arguments in WAYS.items():
        handed, every = roads(call_of_fam(**arguments))
        found[way] = {"scene": summary(handed), "all calls": summary(every)}
        if options.calls:
            print(f"\n{way}\n" + "\n".join(f"  {module:26} {function}" for module, function in handed))
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for way, both in found.items():
        for what, road in both.items():
            counts = ", ".join(f"{road[n]} {n}" for n in ("calls", "stays", "modules", "returns"))
            print(f"\n{way}, {what}: {counts}\n  {' > '.join(road['road'])}")


if __name__ == "__main__":
    main()
