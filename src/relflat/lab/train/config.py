"""The configuration of one run: every value that its numbers depend on, flat and checked.

``make`` takes what the user gave (from the command line, a TOML or a JSON file), fills in the task's
and the algorithm's defaults and rejects every key it does not know.
"""

import json
import tomllib
import types
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from relflat.errors import ConfigError
from relflat.lab.common.names import unknown
from relflat.lab.tasks.catalogue import TASKS, changed_since, full_name, source_of, task_named
from relflat.lab.train.algorithms import ALGORITHMS, algorithm_named, all_algorithms
from relflat.lab.train.settings import RunConfig as RunConfig

RENAMED = {"regularize": "layer", "estimator": "method"}  # keys of schema 1, whose "method" was the algorithm


def make(given: Mapping[str, Any]) -> RunConfig:
    """Build a run's configuration.

    Args:
        given: values by name; ``task`` is required, the rest has defaults.

    Raises:
        ConfigError: an unknown task, algorithm or key (the nearest is named), or a value that does not fit.
    """
    if "task" not in given:
        raise ConfigError(f"No task given. Known: {', '.join(sorted(TASKS))}.")
    name = _text("task", given["task"])
    task = task_named(name)
    _check_names(given)
    algorithm = algorithm_named(_text("algorithm", given.get("algorithm", "plain")))
    common = {field.name: field.default for field in fields(RunConfig) if field.name != "settings"} | {
        "task": name,
        "epochs": task.epochs,
        "batch_size": task.batch_size,
        "lr": task.optimizer.lr,
        "weight_decay": task.optimizer.weight_decay,
    }
    own = {field.name: field.default for field in fields(algorithm)}
    for key in given:
        if key not in common and key not in own:
            raise _misplaced(key, given.get("algorithm", "plain"), [*common, *own])
    hints = {**get_type_hints(RunConfig), **get_type_hints(algorithm)}
    values = {key: check(key, given.get(key, default), hints[key]) for key, default in {**common, **own}.items()}
    if values["source"] is not None:
        require_unchanged(name, values["source"])
    values |= {"task": full_name(name), "source": source_of(name)}
    settings = algorithm(**{key: values[key] for key in own})
    return RunConfig(**{key: values[key] for key in common}, settings=settings)


def migrated(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flat values of schema 1 under today's names; a key that was left out had today's default."""
    names = {**RENAMED, "method": "algorithm"}
    return {names.get(key, key): value for key, value in values.items()}


def require_unchanged(name: str, recorded: str | None, what: str = "this run was trained; train it again") -> None:
    """See that the task's code is what it was.

    Args:
        name: of the task.
        recorded: what stood for it; None for a built-in task of version 1.
        what: what came out of it, and what to do.

    Raises:
        ConfigError: it has changed.
    """
    changed = changed_since(name, recorded)
    if changed is not None:
        raise ConfigError(f"{changed} {what}.")


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{key}={value!r} is not a name.")
    return value


def _check_names(given: Mapping[str, Any]) -> None:
    """Reject keys of schema 1 by their present names."""
    for old, new in RENAMED.items():
        if old in given:
            raise ConfigError(f"{old!r} is called {new!r} now; on the command line --{new}.")
    if given.get("method") in (names := list(ALGORITHMS)):
        raise ConfigError(
            f"method={given['method']!r}: that is an algorithm, so give --algorithm {given['method']} "
            f"(in a file: algorithm). Algorithms: {', '.join(names)}; method is how kappa is computed."
        )


def _misplaced(key: str, algorithm: str, known: list[str]) -> ConfigError:
    """The error for a key that does not belong here, or not to this algorithm."""
    owners = [name for name, other in all_algorithms().items() if key in {field.name for field in fields(other)}]
    if owners:
        return ConfigError(
            f"{key!r} is a setting of algorithm {' and '.join(owners)}, not of {algorithm!r}. "
            f"Add --algorithm {owners[0]}, or leave {key!r} out."
        )
    return unknown("config key", key, known)


def check(key: str, value: Any, hint: Any) -> Any:
    """Return the value as the annotated type, or say what was expected."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = [option for option in options if isinstance(option, type)]
    choices = [choice for option in options for choice in get_args(option)]
    if isinstance(value, int | float) and type(value) is not bool and float in kinds:
        return float(value)
    if type(value) in kinds or value in choices:
        return value
    if choices and isinstance(value, str):
        raise unknown(key, value, choices)
    names = ["none" if kind is types.NoneType else kind.__name__ for kind in kinds]
    raise ConfigError(f"{key}={value!r} is not a valid value; expected {' or '.join(names + choices)}.")


def read_file(path: Path) -> dict[str, Any]:
    """Read the keys and values of a TOML or JSON file.

    Raises:
        ConfigError: the file is not there, not readable, or not a flat table.
    """
    try:
        text = path.read_text()
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"Cannot read the config file {path}: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(
            f"The config file {path} is not valid {path.suffix.lstrip('.') or 'TOML'}: {error}."
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"The config file {path} must hold a table of keys and values.")
    return values
