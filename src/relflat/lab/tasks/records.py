"""The tasks on pictures, signals and texts, out of ``tasks.toml``."""

import copy
import tomllib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from relflat.lab.data import augment, splits
from relflat.lab.tasks import efficientnet, models, task, text
from relflat.lab.tasks.task import Task

PLACES = (augment, splits, efficientnet, models, text, task)  # of what a table may name
KNOWN = {name: value for place in PLACES for name, value in vars(place).items()}
TABLES = tomllib.loads(Path(__file__).with_name("tasks.toml").read_text("utf-8"))


def values_of(name: str) -> dict[str, Any]:
    """The values of a table, with those of the one it is like."""
    own = dict(TABLES[name])
    return {**(values_of(own.pop("like")) if "like" in own else {}), **own}


def called(of: str, args: Sequence[Any] = (), **keywords: Any) -> Any:
    """A function with arguments of its own, or what the name stands for, or the name where it stands for nothing."""
    return partial(KNOWN[of], *args, **keywords) if args or keywords else KNOWN.get(of, of)


def record(name: str, data: dict[str, Any], optimizer: dict[str, Any], **rest: Any) -> Task:
    """The task of a table."""
    source = called(data.pop("of"), data.pop("args", ()))
    values = {
        key: called(**value) if isinstance(value, dict) else value
        for key, value in rest.items()
        if value is not False
    }
    return Task(
        name=name,
        splits=called("classification", [source], **{"test": None, **data}),
        loss=nn.CrossEntropyLoss,
        layer="output",
        optimizer=called(**optimizer)(),
        **{**values, "schedule": KNOWN[rest["schedule"]]},
    )


RECORDS = {name: record(name, **copy.deepcopy(values_of(name))) for name in TABLES}
