"""The configuration of one run: every value that its numbers depend on, flat and checked.

``make`` takes what the user gave (from the command line, a TOML or a JSON file), fills in the task's and the
algorithm's defaults and rejects every key it does not know. Every field of `RunConfig` is an option of
``relflat train``, and its text there is the option's help.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from relflat.errors import ConfigError
from relflat.lab.common.names import unknown
from relflat.lab.data.augment import Augmentation
from relflat.lab.tasks.catalogue import TASKS, changed_since, full_name, source_of, task_named
from relflat.lab.train.algorithms import ALGORITHMS, Algorithm, algorithm_named, all_algorithms

SCHEMA = 3  # of the flat values: raised when a key is added, renamed or removed
RENAMED = {"regularize": "layer", "estimator": "method"}  # keys of schema 1, whose "method" was the algorithm
FAM_BEFORE = {"strength": 0.1, "layer": "output", "bound": None, "every": 1, "warmup_steps": 0}  # up to schema 2
Precision = Literal["no", "bf16", "fp16"]
# values that are not written down
RECIPE = {"recipe_augment": "task", "recipe_smoothing": 0.0, "recipe_dropout": 0.0}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run.

    Attributes:
        task: name of the task, or ``/path/to/file.py:name``.
        source: hash of that file's content, and the task's version from 2 on; None for a built-in task of version 1.
        algorithm: name of the algorithm.
        settings: the algorithm, with its own settings.
        seed: of initial weights, data order, label noise, training subset and probes.
        epochs: passes over the training data.
        batch_size: samples a step.
        lr: learning rate at the start.
        weight_decay: of the optimiser.
        train_size: train on so many samples only, else on all.
        label_noise: redraw each training label with this probability.
        precision: of training, float32 (no) or half where autocast allows; evaluation is always in float32.
        recipe_augment: how training pictures are changed at random, in place of what the task does.
        recipe_smoothing: label smoothing under the algorithm, whichever that is.
        recipe_dropout: rate of dropout on the input of every weight layer, likewise.
    """

    task: str
    source: str | None = None
    algorithm: str = "plain"
    settings: Algorithm
    seed: int = 0
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    train_size: int | None = None
    label_noise: float = 0.0
    precision: Precision = "no"
    recipe_augment: Augmentation = "task"
    recipe_smoothing: float = 0.0
    recipe_dropout: float = 0.0

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size", "lr"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"{key}={getattr(self, key)} must be above 0.")
        if not self.weight_decay >= 0:
            raise ConfigError(f"weight_decay={self.weight_decay} must not be negative.")
        if not 0 <= self.label_noise <= 1:
            raise ConfigError(f"label_noise={self.label_noise} is not a probability; give a number from 0 to 1.")
        if self.precision == "fp16" and self.settings.two_passes:
            raise ConfigError(
                f"precision='fp16' scales the loss, which algorithm {self.algorithm!r} with its two passes a step "
                "cannot follow; use precision='bf16'."
            )
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed} must lie between 0 and 2**32 - 1.")
        if getattr(self, f"recipe_{self.algorithm}", None):
            raise ConfigError(f"recipe_{self.algorithm}: algorithm {self.algorithm!r} is that already; leave it out.")

    def flat(self) -> dict[str, Any]:
        """All values as one flat mapping, a recipe's where there is one; ``make`` gives this configuration again."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "settings"}
        return {key: value for key, value in values.items() if value != RECIPE.get(key, ...)} | asdict(self.settings)

    @property
    def digest(self) -> str:
        """Ten hexadecimal digits that stand for all values."""
        text = json.dumps({"schema": SCHEMA, **self.flat()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]


def make(given: Mapping[str, Any]) -> RunConfig:
    """Build a run's configuration from values by name; ``task`` is required, the rest has defaults."""
    if "task" not in given:
        raise ConfigError(f"No task given. Known: {', '.join(sorted(TASKS))}.")
    name = _text("task", given["task"])
    task = task_named(name)
    _check_names(given)
    algorithm = algorithm_named(_text("algorithm", given.get("algorithm", "plain")))
    all_fields = [*fields(RunConfig), *fields(algorithm)]
    values: dict[str, Any] = {field.name: field.default for field in all_fields if field.name != "settings"}
    values |= {"epochs": task.epochs, "batch_size": task.batch_size}
    values |= {"lr": task.optimizer.lr, "weight_decay": task.optimizer.weight_decay}
    for key in given:
        if key not in values:
            raise _misplaced(key, given.get("algorithm", "plain"), list(values))
    hints = get_type_hints(RunConfig) | get_type_hints(algorithm)
    values = {key: check(key, value, hints[key]) for key, value in (values | dict(given)).items()}
    if values["source"] is not None:
        require_unchanged(name, values["source"])
    values |= {"task": full_name(name), "source": source_of(name)}
    settings = algorithm(**{field.name: values.pop(field.name) for field in fields(algorithm)})
    return RunConfig(**values, settings=settings)


def require_unchanged(name: str, recorded: str | None, what: str = "this run was trained; train it again") -> None:
    """See that a task's code is what it was when ``source_of`` gave what is recorded; ``what`` says what to do."""
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
    if given.get("method") in list(ALGORITHMS):
        raise ConfigError(
            f"method={given['method']!r}: that is an algorithm, so give --algorithm {given['method']} "
            f"(in a file: algorithm). Algorithms: {', '.join(ALGORITHMS)}; method is how kappa is computed."
        )


def _misplaced(key: str, algorithm: str, known: list[str]) -> ConfigError:
    """The error for a key that does not belong here, or not to this algorithm."""
    owners = [name for name, other in all_algorithms().items() if key in {field.name for field in fields(other)}]
    if not owners:
        return unknown("config key", key, known)
    return ConfigError(
        f"{key!r} is a setting of algorithm {' and '.join(owners)}, not of {algorithm!r}. "
        f"Add --algorithm {owners[0]}, or leave {key!r} out."
    )


def _alternatives(hint: Any) -> tuple[list[type], list[str]]:
    """The types and the literals of an annotation."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [option for option in options if isinstance(option, type)]
    return kinds, [choice for option in options for choice in get_args(option)]


def check(key: str, value: Any, hint: Any) -> Any:
    """Return the value as the annotated type, or say what was expected."""
    kinds, choices = _alternatives(hint)
    if float in kinds and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if type(value) in kinds or value in choices:
        return value
    if choices and isinstance(value, str):
        raise unknown(key, value, choices)
    names = ["none" if kind is NoneType else kind.__name__ for kind in kinds]
    raise ConfigError(f"{key}={value!r} is not a valid value; expected {' or '.join(names + choices)}.")
