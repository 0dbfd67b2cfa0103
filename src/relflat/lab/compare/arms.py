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
    values: tuple[float, ...]  # what is tried for it; none: nothing is searched
    usual: float | None = None  # what it is where nothing is searched; None: what the task has
    fixed: Values = field(default_factory=dict)  # other values that differ from the algorithm's defaults
    below: float | None = None  # what a value beyond the last one must stay below
    origin: str = ""  # where the values come from

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))  # from JSON and TOML it is a list

    @property
    def grid(self) -> list[Values]:
        """The settings to try, or the usual one."""
        values = self.values or (() if self.usual is None else (self.usual,))
        return [{**self.fixed, self.key: value} for value in values] or [self.fixed]

    def beyond(self, tried: Iterable[float], best: float) -> Values | None:
        """The setting past the end of what was tried, a step as large as the last, if the best is that end."""
        values = sorted(tried)
        if len(self.values) < 3 or best not in (values[0], values[-1]):
            return None
        beside = values[1] if best == values[0] else values[-2]
        if min(best, beside) <= 0:
            return None
        value = float(f"{best * best / beside:.6g}")
        return None if self.below is not None and value >= self.below else {**self.fixed, self.key: value}


ARMS = {
    name: Arm(name, **finite(table))  # an infinite bound is none
    for name, table in tomllib.loads(Path(__file__).with_name("arms.toml").read_text("utf-8")).items()
}


def arms_named(names: Iterable[str]) -> tuple[Arm, ...]:
    """The arms with these names, in that order, several in one with commas too; none may be named twice."""
    found = tuple(look_up("arm", name.strip(), ARMS) for name in ",".join(names).split(","))
    twice = sorted({arm.name for arm in found if found.count(arm) > 1})
    if twice:
        raise ConfigError(f"Arms {twice} are named more than once; name each once.")
    return found
