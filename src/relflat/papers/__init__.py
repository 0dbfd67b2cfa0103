"""The experiments of the papers on relative flatness, as code: ``relflat reproduce NAME``.

A module an experiment; each is imported when it is asked for.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec

from relflat.errors import ConfigError
from relflat.lab.names import look_up
from relflat.papers.experiment import Experiment

NAMES = ("table1", "table2", "table3", "cost", "correlation", "invariance", "layers", "grokking")


class Experiments(Mapping[str, Experiment]):
    """Experiments by name; one is read from its module when it is taken out."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    def __getitem__(self, name: str) -> Experiment:
        if name not in self._names:
            raise KeyError(name)
        module = f"{__name__}.{name}"
        if find_spec(module) is None:
            raise ConfigError(f"The experiment {name!r} is not part of this version: there is no {module}.")
        found: Experiment = import_module(module).EXPERIMENT
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


EXPERIMENTS: Mapping[str, Experiment] = Experiments(NAMES)


def experiment_named(name: str) -> Experiment:
    """The experiment of this name.

    Raises:
        ConfigError: there is none; the nearest name is given.
    """
    return look_up("experiment", name, EXPERIMENTS)
