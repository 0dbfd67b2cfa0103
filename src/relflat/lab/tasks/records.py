"""Tasks out of tables; those on pictures, signals and texts are in ``tasks.toml``."""

import copy
import tomllib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from relflat.lab.data import augment, splits
from relflat.lab.tasks import efficientnet, models, task, text
from relflat.lab.tasks.task import Task

PLACES = (augment, splits, efficientnet, models, text, task)  # of what a table may name
KNOWN = {name: value for place in PLACES for name, value in vars(place).items()}


def read(path: Path, *names: str, own: Mapping[str, Any] = MappingProxyType({})) -> list[Task]:
    """The tasks of a file of tables, by default all of them; a table may name what is in ``own`` too."""
    tables, known = tomllib.loads(path.read_text("utf-8")), {**KNOWN, **own}

    def values_of(name: str) -> dict[str, Any]:
        """The values of a table, with those of the one it is like."""
        own = copy.deepcopy(tables[name])
        return {**(values_of(own.pop("like")) if "like" in own else {}), **own}

    return [record(name, known, **values_of(name)) for name in names or tables]


def record(
    name: str, known: Mapping[str, Any], optimizer: dict[str, Any], data: dict[str, Any] | None = None, **rest: Any
) -> Task:
    """The task of a table."""

    def called(of: str, args: Sequence[Any] = (), **keywords: Any) -> Any:
        """A function, with arguments of its own if there are any, or what else the name stands for."""
        return partial(known[of], *args, **keywords) if args or keywords else known[of]

    values = {"loss": nn.CrossEntropyLoss, "layer": "output", **rest}
    values = {key: called(**value) if isinstance(value, dict) else value for key, value in values.items()}
    if data is not None:
        of, args = data.pop("of"), data.pop("args", ())
        source = called(of, args) if of in known else of  # a data set
        values["splits"] = called("classification", [source], **{"test": None, **data})
    values |= {"optimizer": called(**optimizer)(), "schedule": known[rest["schedule"]]}
    return Task(name=name, **{key: value for key, value in values.items() if value is not False})


RECORDS = {each.name: each for each in read(Path(__file__).with_name("tasks.toml"))}
