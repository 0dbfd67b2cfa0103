"""The options of ``relflat train`` and ``compare``, made of the records that a run's configuration is made of.

A field of `RunConfig` or of an algorithm's settings is an option; its help is its text in the docstring of the class,
its default is the field's. So nothing about an option is written a second time.
"""

from dataclasses import MISSING, Field, dataclass, fields
from typing import Annotated, Any, Literal, TypedDict, get_args, get_origin, get_type_hints

import tyro
from docstring_parser import parse

from relflat.lab.train.algorithms import ALGORITHMS
from relflat.lab.train.config import RunConfig

TASKS = (
    "digits, digits-unshifted, fashion-mnist, fashion-mnist-resnet18, fashion-mnist-wrn, cifar10, cifar10-resnet20, "
    "cifar10-resnet18, cifar10-wrn, cifar10-finetune, cifar100, cifar100-finetune, svhn, svhn-wrn, mnist1d, reviews, "
    "rte, mrpc, sst2, skulls, skulls-unet, addition, addition-transformer"
)  # written out, so that the help of other commands need not import the tasks

TaskName = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="TASK",
        help="path/to/file.py:name for a task of your own (docs/study/own-task.md), or a built-in one "
        f"(docs/tasks.md): {TASKS}.",
    ),
]


@dataclass(frozen=True)
class Budget:
    """What each arm may spend. Its fields are options of ``relflat compare``, with the texts below.

    Attributes:
        seeds: number of tested seeds an arm.
        first_seed: the first of them; another one repeats a comparison on seeds of its own.
        search_seeds: number of seeds that settings are chosen by (100, 101, ...).
        trials: number of settings an arm, at most as many as its grid has; 0: none, the usual one.
        beyond: how far to go on where the best of three settings or more is the last on its side: settings more.
        also_untuned: make a second table, of every arm at its usual setting.
        recipe: choose label smoothing, dropout and augmentation by plain alone, and put them under every arm.
    """

    seeds: int = 8
    first_seed: int = 0
    search_seeds: int = 2
    trials: int = 4
    beyond: int = 2
    also_untuned: bool = False
    recipe: bool = False


def run_values() -> Any:
    """A dictionary type with a key for each value of a run; what is left out has its default."""
    owners: dict[str, dict[str, Field[Any]]] = {}
    for algorithm, settings in ALGORITHMS.items():
        for field in fields(settings):
            owners.setdefault(field.name, {})[algorithm] = field
    own = {}
    for name, by_algorithm in owners.items():
        whose: dict[str, list[str]] = {}
        for algorithm, field in by_algorithm.items():
            whose.setdefault(default_of(field), []).append(algorithm)
        shown = "; ".join(f"{', '.join(names)}; default: {value}" for value, names in whose.items())
        first = next(iter(by_algorithm))
        own[name] = option(ALGORITHMS[first], by_algorithm[first], shown)
    return TypedDict("RunValues", common_options() | own, total=False)  # type: ignore[operator]  # made here


def common_values() -> Any:
    """The same of the values that all runs of a comparison may share."""
    options = common_options()
    del options["algorithm"], options["seed"]
    return TypedDict("CommonValues", options, total=False)  # type: ignore[operator]  # made here


def common_options() -> dict[str, Any]:
    """The options that belong to no algorithm."""
    return {
        field.name: option(RunConfig, field, f"default: {default_of(field)}")
        for field in fields(RunConfig)
        if field.name not in ("task", "source", "settings")
    }


def option(record: type[Any], field: Field[Any], default: str) -> Any:
    """The type of one option with its help; a choice is checked by `relflat.lab.train.config`, which knows more."""
    hint = get_type_hints(record)[field.name]
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    kind = str if choices else (get_args(hint) or (hint,))[0]
    metavar = "|".join(choices) or {bool: "True|False", str: field.name.upper()}.get(kind, kind.__name__.upper())
    text = described(record, field.name)
    if field.name == "algorithm":
        text = f"{text.rstrip('.')}: {', '.join(ALGORITHMS)}."
    shown = tyro.conf.arg(metavar=metavar, help=text, help_behavior_hint=f"({default})")
    return Annotated[kind, tyro.conf.FlagConversionOff, shown] if kind is bool else Annotated[kind, shown]


def described(record: type[Any], name: str) -> str:
    """What the docstring of a record, or of one it extends, says of a field."""
    found = (one for owner in record.__mro__ for one in parse(owner.__doc__ or "").params)
    return next(one.description for one in found if one.arg_name == name and one.description)


def default_of(field: Field[Any]) -> str:
    """A default as it is shown; the task has those that the record has not."""
    if field.default is MISSING:
        return "the task's"
    if field.default is None:
        return "none"
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
