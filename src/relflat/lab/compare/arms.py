"""Arms of a comparison: an algorithm, what is held fixed, and the one value that is searched over.

They are written in ``arms.toml``; a new one is one more table there.
"""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relflat.errors import ConfigError
from relflat.lab.common.names import look_up

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Arm:
    """One contender.

    Attributes:
        name: on the command line and in files.
        title: in tables and figures.
        algorithm: name of the algorithm it trains by.
        key: the value that is searched over.
        values: what is tried for it.
        fixed: other values that differ from the algorithm's defaults.
        origin: where the values come from.
    """

    name: str
    title: str
    algorithm: str
    key: str
    values: tuple[float, ...]
    fixed: Values = field(default_factory=dict)
    origin: str = ""

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
        trials: number of settings an arm, at most as many as its grid has.
    """

    seeds: int = 8
    first_seed: int = 0
    search_seeds: int = 2
    trials: int = 4


TABLES = tomllib.loads(Path(__file__).with_name("arms.toml").read_text())
ARMS: dict[str, Arm] = {name: Arm(name, **table) for name, table in TABLES.items()}


def arms_named(names: Iterable[str]) -> tuple[Arm, ...]:
    """The arms with these names, in that order.

    Raises:
        ConfigError: an unknown name (the nearest is named), or one that is given twice.
    """
    found = tuple(look_up("arm", name, ARMS) for name in names)
    twice = sorted({arm.name for arm in found if found.count(arm) > 1})
    if twice:
        raise ConfigError(f"Arms {twice} are named more than once; name each once.")
    return found
