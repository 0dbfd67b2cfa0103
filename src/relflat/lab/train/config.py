"""The configuration of one run: every value that its numbers depend on, flat and checked.

``make`` takes what the user gave (from the command line, a TOML or a JSON file), fills in the task's
and the algorithm's defaults and rejects every key it does not know.
"""

import hashlib
import json
import tomllib
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from relflat.errors import ConfigError
from relflat.lab.names import look_up, unknown
from relflat.lab.tasks.catalogue import TASKS, changed_since, full_name, source_of, task_named
from relflat.lab.train.algorithms import ALGORITHMS, base_optimizer

Precision = Literal["no", "bf16", "fp16"]

# Keys that came later, and what earlier runs had: left out where that still holds, so that old runs keep their hash.
LATER: dict[str, Any] = {
    "source": None,
    "precision": "no",
    "temperature": 1.0,
    "unit_features": False,
    "remove_after": None,
    "weight_cap": None,
    "layers_per_step": None,
}


@dataclass(frozen=True)
class RunConfig:
    """One run.

    Attributes:
        task: name of the task, or ``/path/to/file.py:name``.
        source: hash of that file's content, and the task's version from 2 on; None for a built-in task of version 1.
        algorithm: name of the algorithm.
        seed: of initial weights, data order, label noise, training subset and probes.
        epochs: passes over the training data.
        batch_size: samples a step.
        lr: learning rate at the start.
        weight_decay: of the base optimiser.
        train_size: number of training samples; None for all.
        label_noise: probability with which a training label is redrawn.
        precision: what training computes in: ``"no"`` (float32), or ``"bf16"`` or ``"fp16"`` where autocast allows;
            evaluation is always in float32.
        settings: the algorithm's own settings.
    """

    task: str
    source: str | None
    algorithm: str
    seed: int
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    train_size: int | None
    label_noise: float
    precision: Precision
    settings: Any

    def flat(self) -> dict[str, Any]:
        """All values as one flat mapping; ``make`` turns it back into this configuration."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "settings"}
        values |= asdict(self.settings)
        return {key: value for key, value in values.items() if key not in LATER or value != LATER[key]}

    @property
    def digest(self) -> str:
        """Ten hexadecimal digits that stand for all values."""
        text = json.dumps(self.flat(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]


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
    algorithm = look_up("algorithm", _text("algorithm", given.get("algorithm", "plain")), ALGORITHMS)
    common: dict[str, Any] = {
        "task": name,
        "source": None,
        "algorithm": "plain",
        "seed": 0,
        "epochs": task.epochs,
        "batch_size": task.batch_size,
        "lr": task.optimizer.lr,
        "weight_decay": task.optimizer.weight_decay,
        "train_size": None,
        "label_noise": 0.0,
        "precision": "no",
    }
    own = {field.name: field.default for field in fields(algorithm.settings)}
    for key in given:
        if key not in common and key not in own:
            raise _misplaced(key, given.get("algorithm", "plain"), [*common, *own])
    hints = {**get_type_hints(RunConfig), **get_type_hints(algorithm.settings)}
    values = {
        key: check(key, given.get(key, default), hints[key]) for key, default in {**common, **own}.items()
    }
    values |= {"task": full_name(name), "source": _unchanged(name, values["source"])}
    config = RunConfig(
        **{key: values[key] for key in common},
        settings=algorithm.settings(**{key: values[key] for key in own}),
    )
    _check_ranges(config)
    return config


def _unchanged(name: str, recorded: str | None) -> str | None:
    """What stands for the task's code now; if it was recorded, it must be the same."""
    if recorded is not None:
        require_unchanged(name, recorded)
    return source_of(name)


def require_unchanged(
    name: str, recorded: str | None, what: str = "this run was trained; train it again"
) -> None:
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


def _misplaced(key: str, algorithm: str, known: list[str]) -> ConfigError:
    """The error for a key that does not belong here, or not to this algorithm."""
    owners = [
        name for name, other in ALGORITHMS.items() if key in {field.name for field in fields(other.settings)}
    ]
    if owners:
        return ConfigError(
            f"{key!r} is a setting of algorithm {' and '.join(owners)}, not of {algorithm!r}. "
            f"Add --algorithm {owners[0]}, or leave {key!r} out."
        )
    return unknown("config key", key, known)


def check(key: str, value: Any, hint: Any) -> Any:
    """Return the value as the annotated type, or say what was expected."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if option is type(None):
            if value is None:
                return None
        elif get_origin(option) is Literal:
            if value in get_args(option):
                return value
        elif option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        elif type(value) is option:
            return value
    literals = [str(choice) for option in options for choice in get_args(option)]
    if literals and isinstance(value, str):
        raise unknown(f"{key}", value, literals)
    expected = " or ".join("none" if option is type(None) else option.__name__ for option in options)
    raise ConfigError(f"{key}={value!r} is not a valid value; expected {expected}.")


def _check_ranges(config: RunConfig) -> None:
    """Reject numbers that no run can have; the algorithm's own settings are checked where they are used."""
    positive = {"epochs": config.epochs, "batch_size": config.batch_size, "lr": config.lr}
    for key, value in positive.items():
        if not value > 0:
            raise ConfigError(f"{key}={value} must be above 0.")
    if not config.weight_decay >= 0:
        raise ConfigError(f"weight_decay={config.weight_decay} must not be negative.")
    if not 0 <= config.label_noise <= 1:
        raise ConfigError(
            f"label_noise={config.label_noise} is not a probability; give a number from 0 to 1."
        )
    if config.precision == "fp16" and ALGORITHMS[config.algorithm].optimizer is not base_optimizer:
        raise ConfigError(
            f"precision='fp16' scales the loss, which algorithm {config.algorithm!r} with its two passes a step "
            "cannot follow; use precision='bf16'."
        )
    if not 0 <= config.seed < 2**32:
        raise ConfigError(f"seed={config.seed} must lie between 0 and 2**32 - 1.")


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
