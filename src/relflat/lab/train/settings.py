"""The values of one run. Every field is an option of ``relflat train``, and its text here is the option's help."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from relflat.errors import ConfigError
from relflat.lab.train.algorithms import Algorithm

SCHEMA = 2  # of the flat values: raised when a key is added, renamed or removed
Precision = Literal["no", "bf16", "fp16"]


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

    def flat(self) -> dict[str, Any]:
        """All values as one flat mapping; ``make`` turns it back into this configuration."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "settings"}
        return values | asdict(self.settings)

    @property
    def digest(self) -> str:
        """Ten hexadecimal digits that stand for all values."""
        text = json.dumps({"schema": SCHEMA, **self.flat()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]
