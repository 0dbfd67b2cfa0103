"""Data sets, tasks, training and reports around the core; needs the extra ``lab``.

The core of relflat never imports this package. Data flows one way through it:
sources -> fetch -> data -> splits -> tasks -> algorithms -> training -> store -> trials -> report.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_MOVED = {
    "train": "checkpoint config environment measuring store store=lock timing",
    "data": "augment batches fetch hub mnist1d reviews sources splits",
    "compare": "arms statistics trials",
    "tasks": "efficientnet models own text",
    "common": "jsonable names",
    "report": "drawing=figures study summary",
    "tasks.metrics": "=evaluate",
}


class _Moved(MetaPathFinder, Loader):
    """Modules that are in a folder of their own now, under their older paths."""

    paths = {  # noqa: RUF012
        f"{__name__}.{old or new}": f"{__name__}.{room}" + (f".{new}" if new else "")
        for room, names in _MOVED.items()
        for new, _, old in (name.partition("=") for name in names.split())
    }

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """One of those, if it is asked for."""
        return ModuleSpec(name, self) if name in self.paths else None

    def exec_module(self, module: ModuleType) -> None:
        """The module itself, in the place of the one that was made for it."""
        sys.modules[module.__name__] = import_module(self.paths[module.__name__])


sys.meta_path.append(_Moved())
