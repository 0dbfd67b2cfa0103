"""How large the penalty of a step is: its strength or its size, how often it comes, and its bound.

A penalty ``lambda kappa`` has no scale of its own: kappa is a high power of the weights and is summed over layers, so
a lambda that regularises one network kills another. Two things make one number fit many networks. The *size* is the
lambda of the mean over layers, ``lambda = size / number of layers``; as kappa and the loss have the same unit, it has
none. The *bound* keeps the penalty of a step below a share of its loss, by a factor that counts as a constant: one
step of an unbounded one may turn a network that is not fitted yet into a constant function (docs/concepts.md).
"""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from relflat import guards
from relflat.errors import ConfigError
from relflat.options import Number, check

SIZE, BOUND, EVERY = 0.004, 0.3, 8
"""Of ``FAM(loss_fn, model)``; docs/study/default.md has how they were set, on validation data, and where they end."""


class Sizing:
    """Either ``strength``, the paper's lambda on the sum over layers, or ``size``; at most a share of the loss.

    Args:
        given: ``layer``, ``strength``, ``size`` and ``radius``, as FAM was given them.
        bound: largest penalty of a step, as a share of its task loss; None for no bound.
        every: a penalty comes at each so-many-th step, multiplied by this number.
        warmup_steps: deprecated form of a strength that is a function of the step.

    Raises:
        ConfigError: two sizes are given, a strength without a layer, or a number that is none.
    """

    def __init__(
        self, given: Mapping[str, Any], bound: float | None, every: int | None, warmup_steps: int = 0
    ) -> None:
        given = {name: value for name, value in given.items() if value is not None}
        for problem in _wrong_together(given):
            raise ConfigError(problem.format(**given))
        self.by_layers = not {"strength", "radius"} & given.keys()
        self.name, usual = ("size", SIZE) if self.by_layers else ("strength", 1.0)
        self.number: Number = given.get(self.name, usual)
        self.bound = None if "radius" in given else bound
        self.every = every or (EVERY if self.by_layers else 1)
        self._factor: Tensor | float = 1.0
        self._bounded: Tensor | int = 0
        self._penalties = 0
        if warmup_steps:
            self.number = _warmed_up(self.name, self.number, warmup_steps)
        self._number_at(0)

    def change(self, name: str, number: Number) -> None:
        """Set the one that was given.

        Raises:
            ConfigError: it is no number, or the other one was given.
        """
        if name != self.name:
            raise ConfigError(f"{name}={number!r}: the size of this penalty was given as {self.name}; set that")
        check(**{name: number})
        self.number = number

    def strength_at(self, step: int, layers: int) -> float:
        """The lambda of a step of training, without ``every`` and bound; 0 where it has no penalty."""
        if step % self.every:
            return 0.0
        return self._number_at(step) / (max(1, layers) if self.by_layers else 1)

    def _number_at(self, step: int) -> float:
        if type(self.number) is float:
            return self.number  # checked when it was set
        number = self.number(step) if callable(self.number) else self.number
        if callable(number):
            raise ConfigError(f"{self.name} at step {step} is a function; a finite number is needed")
        try:
            check(**{self.name: number})
        except ConfigError as error:
            raise ConfigError(f"at step {step}, {error}") from error
        return number

    def penalty(self, strength: float, kappa: Tensor, task: Tensor) -> Tensor:
        """``c every lambda kappa`` with ``c = min(1, bound |task| / |every lambda kappa|)``.

        The factor c counts as a constant. Means over samples stand for losses that are not reduced.
        """
        amount: Tensor | float = self.every * strength
        self._penalties += 1
        if self.bound is not None:
            large, most = abs(amount * _mean(kappa)), self.bound * abs(_mean(task))
            over = large > most
            if isinstance(over, Tensor):
                self._factor = torch.where(over, most / large, 1.0)
            else:
                self._factor = most / large if over else 1.0
            self._bounded, amount = self._bounded + over, amount * self._factor
        return kappa * amount

    def report(self) -> dict[str, Any]:
        """What is said of it in ``last``, which waits for the device."""
        said = {"size": self.number} if self.by_layers and not callable(self.number) else {}
        return said | {"factor": float(self._factor), "bounded": int(self._bounded), "penalties": self._penalties}

    def __str__(self) -> str:
        return f"{self.name}={self.number}, bound={self.bound}, every={self.every}"


def _mean(x: Tensor) -> Any:
    """Of all entries, in at least single precision: as a number where looking at it waits for nothing."""
    x = x.detach() if x.ndim == 0 else x.detach().mean()
    return x.to(torch.promote_types(x.dtype, torch.float32)) if guards.waits(x) else x.item()


def _wrong_together(given: Mapping[str, Any]) -> Iterator[str]:
    if {"strength", "size"} <= given.keys():
        yield (
            "strength={strength} and size={size} both say how large the penalty is; give size (lambda is size over "
            "the number of layers) or strength (the paper's lambda)"
        )
    if {"radius", "size"} <= given.keys():
        yield "size={size} has no meaning with radius={radius}, which is a size itself; leave it out"
    if "strength" in given and "layer" not in given:
        yield (
            "strength={strength} is the lambda of a layer's kappa: name the layer, or leave strength out for all "
            "layers and a size that needs no tuning"
        )


def _warmed_up(name: str, number: Number, steps: int) -> Number:
    """What ``warmup_steps`` stood for, with a warning that names what replaces it."""
    if callable(number):
        raise ConfigError(f"warmup_steps={steps}: give {name} as a function of the step in its place")
    replacement = f"{name}=lambda step: {number} * min(1, (step + 1) / {steps + 1})"
    warnings.warn(f"warmup_steps is deprecated; give {replacement}", DeprecationWarning, stacklevel=5)
    return lambda step: number * min(1.0, (step + 1) / (steps + 1))
