"""Modules that are elsewhere now: their old paths lead to the new ones, with a word on where that is."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

SAME_NAME = {  # below `relflat.lab`, by where they are
    "common": "jsonable names",
    "compare": "arms engines statistics trials",
    "data": "augment batches fetch hub mnist1d reviews sources splits",
    "report": "study summary",
    "tasks": "efficientnet models own text",
    "train": "checkpoint config environment measuring store timing",
}
OTHER_NAME = {
    "compare.study": "report.study",
    "disturb": "train.algorithms",
    "evaluate": "tasks.metrics",
    "export": "report.report",
    "figures": "report.drawing",
    "launch": "train.session",
    "lock": "train.store",
    "methods": "train.algorithms",
    "page": "report.document",
    "terminal": "report.report",
    "train.evaluate": "tasks.metrics",
    "train.lock": "train.store",
    "training": "train.loop",
}
MOVED = {
    f"relflat.lab.{name}": f"relflat.lab.{room}.{name}" for room in SAME_NAME for name in SAME_NAME[room].split()
}
MOVED |= {f"relflat.lab.{old}": f"relflat.lab.{new}" for old, new in OTHER_NAME.items()}
MOVED |= {f"relflat.lab.{name}": f"relflat.papers.{name}" for name in ("knobs", "skull_metrics", "skulls")}
MOVED["relflat.lab.grokking"] = "relflat.papers.modular_addition"
DOCUMENTED = {f"relflat.lab.{name}" for name in ("evaluate", "models", "splits")}  # these stay as they are


class Moved(MetaPathFinder, Loader):
    """Finds the modules of the table under their old names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Claim a name of the table."""
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the module from the new place where the import system looks for the old one."""
        old, new = module.__name__, MOVED[module.__name__]
        if old not in DOCUMENTED:
            warnings.warn(f"{old} is {new} now.", DeprecationWarning, stacklevel=2)
        sys.modules[old] = import_module(new)


sys.meta_path.append(Moved())
