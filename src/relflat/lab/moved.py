"""Modules that are elsewhere now: their old paths lead to the new ones, with a word on where that is."""

import sys
import tomllib
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.resources import files
from types import ModuleType

TABLE = tomllib.loads(files(__package__).joinpath("moved.toml").read_text("utf-8"))
MOVED = {f"relflat.lab.{old}": f"relflat.{new}" for old, new in TABLE["moved"].items()}
DOCUMENTED = {f"relflat.lab.{name}" for name in TABLE["documented"]}  # they stay, without a word


class Moved(MetaPathFinder, Loader):
    """Finds the modules of the table under their old names."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        """Claim a name of the table."""
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the module from the new place where the import system looks for the old one."""
        old, new = module.__name__, MOVED[module.__name__]
        if old not in DOCUMENTED:
            warnings.warn(f"{old} is {new} now.", DeprecationWarning, stacklevel=2)
        sys.modules[old] = import_module(new)


sys.meta_path.append(Moved())
