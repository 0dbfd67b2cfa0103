"""The options of FAM and of measuring in one record, with every check of them.

A new option of FAM is a field here, with its check; an argument of :class:`relflat.FAM`, with its meaning; and, where
the lab is to have it, a field of ``Fam`` in ``lab/train/algorithms.py``.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Literal, get_args

from relflat.errors import ConfigError

Curvature = Literal["hessian", "ggn"]
Gradient = Literal["full", "frozen", "weights"]
Method = Literal["auto", "closed_form", "exact", "probe", "finite_difference", "xtrace"]
"""The methods that come with the library; :func:`relflat.estimate.methods.register` adds others."""
Strength = float | Callable[[int], float]
"""The paper's lambda, or that of each step."""


@dataclass(frozen=True)
class Options:
    """What is estimated and how: options of :class:`relflat.FAM` and :func:`relflat.relative_flatness`, and more.

    Attributes:
        measuring: no graph is built, and no gradient is wanted.
        trace: whether ``Tr H`` is wanted too.
        exact_up_to: largest number of products for which ``"auto"`` prefers a sum over a basis; in training
            for output layers only, whose products cost nothing but the loss.

    Raises:
        ConfigError: naming the argument, its value and what it may be.
    """

    curvature: Curvature = "ggn"
    method: str = "auto"
    probes: int = 1
    adaptive: bool = False
    normalize_features: bool = False
    gradient: Gradient = "full"
    radius: float | None = None
    every: int = 1
    layers_per_step: int | None = None
    _: KW_ONLY
    measuring: bool = False
    trace: bool = False
    exact_up_to: int = 16

    def __post_init__(self) -> None:
        for problem in (*self._wrong_values(), *self._wrong_together()):
            raise ConfigError(problem)

    @property
    def full(self) -> bool:
        """Whether the curvature itself is differentiated (third derivatives)."""
        return self.gradient == "full" and not self.measuring

    @property
    def constant_features(self) -> bool:
        """Whether no gradient goes through the features."""
        return self.measuring or self.gradient == "weights"

    def _wrong_values(self) -> Iterator[str]:
        for name, allowed in (("curvature", Curvature), ("gradient", Gradient)):
            value = getattr(self, name)
            if value not in get_args(allowed):
                yield f"{name}={value!r}: choose one of {list(get_args(allowed))}"
        if self.probes < 1:
            yield f"probes={self.probes}: at least one product is needed"
        if self.radius is not None and not self.radius > 0:
            yield f"radius={self.radius}: a positive number is needed, or None for kappa itself"
        if self.every < 1:
            yield f"every={self.every}: a number of steps from 1 on is needed"

    def _wrong_together(self) -> Iterator[str]:
        if self.method == "xtrace" and not self.measuring:
            yield (
                "method='xtrace' measures over all of the data and has no gradient; use it in relative_flatness, and "
                "'auto' or 'probe' in training"
            )
        if self.method == "xtrace" and (self.probes < 4 or self.probes % 2):
            yield (
                f"probes={self.probes}: XTrace spends products in pairs and needs two pairs for an error; give an "
                "even number from 4 on"
            )
        if self.method == "finite_difference" and self.gradient != "full":
            yield f"gradient={self.gradient!r}: finite differences have the full gradient only"
        if self.method == "finite_difference" and self.curvature != "hessian":
            yield "method='finite_difference' estimates the Hessian: add curvature='hessian'"
        if self.radius is not None:
            yield from self._wrong_with_radius()

    def _wrong_with_radius(self) -> Iterator[str]:
        for name in ("gradient", "method", "layers_per_step"):
            if getattr(self, name) != Options.__dataclass_fields__[name].default:
                yield (
                    f"{name} has no meaning with radius={self.radius}, which moves all layers at once and needs no "
                    "curvature; leave it out"
                )


def strength_at(strength: Strength, step: int) -> float:
    """The strength of a step.

    Raises:
        ConfigError: it is not a finite number.
    """
    value = strength(step) if callable(strength) else strength
    if not math.isfinite(value):
        raise ConfigError(f"strength={value}: a finite number is needed")
    return value


def warmed_up(strength: Strength, steps: int) -> Strength:
    """What ``warmup_steps`` stood for, with a warning that names what replaces it."""
    if steps < 0 or callable(strength):
        raise ConfigError(f"warmup_steps={steps}: give strength as a function of the step in its place")
    replacement = f"strength=lambda step: {strength} * min(1, (step + 1) / {steps + 1})"
    warnings.warn(f"warmup_steps is deprecated; give {replacement}", DeprecationWarning, stacklevel=3)
    return lambda step: strength * min(1.0, (step + 1) / (steps + 1))
