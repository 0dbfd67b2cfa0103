"""Arms of a comparison: an algorithm, what is held fixed, and the one value that is searched over.

They are written in ``arms.toml``; a new one is one more table there.
"""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relflat.errors import ConfigError
from relflat.lab.common.jsonable import finite
from relflat.lab.common.names import look_up

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Arm:
    """One contender."""

    name: str  # on the command line and in files
    title: str  # in tables and figures
    algorithm: str
    key: str  # the value that is searched over
    values: tuple[float, ...]  # what is tried for it
    usual: float | None = None  # what it is where nothing is searched
    fixed: Values = field(default_factory=dict)  # other values that differ from the algorithm's defaults
    origin: str = ""  # where the values come from

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))  # from JSON and TOML it is a list

    @property
    def grid(self) -> list[Values]:
        """The settings to try."""
        return [{**self.fixed, self.key: value} for value in self.values]


@dataclass(frozen=True)
class Budget:
    """What each arm may spend. Its fields are options of ``relflat compare``, with the texts below.

    Attributes:
        seeds: number of tested seeds an arm.
        first_seed: the first of them; another one repeats a comparison on seeds of its own.
        search_seeds: number of seeds that settings are chosen by (100, 101, ...).
        trials: number of settings an arm, at most as many as its grid has; 0: none, the usual one.
    """

    seeds: int = 8
    first_seed: int = 0
    search_seeds: int = 2
    trials: int = 4


ARMS = {
    name: Arm(name, **finite(table))  # an infinite bound is none
    for name, table in tomllib.loads(Path(__file__).with_name("arms.toml").read_text("utf-8")).items()
}


def arms_named(names: Iterable[str]) -> tuple[Arm, ...]:
    """The arms with these names, in that order; none may be named twice."""
    found = tuple(look_up("arm", name, ARMS) for name in names)
    twice = sorted({arm.name for arm in found if found.count(arm) > 1})
    if twice:
        raise ConfigError(f"Arms {twice} are named more than once; name each once.")
    return found
