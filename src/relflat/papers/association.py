"""How two numbers of the same networks go together: Kendall's tau and Pearson's r, with bootstrap intervals."""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relflat.errors import DataError

RESAMPLES = 2000
TAIL = (1 - 0.95) / 2  # outside of the interval, on each side
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A coefficient, nan where a number is the same for all, with its percentile bootstrap interval, 95 %."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} ({self.low:+.2f} to {self.high:+.2f})" if math.isfinite(self.value) else "–"

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on one side of zero, else 0."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


@dataclass(frozen=True)
class Association:
    """Kendall's tau-b, of the ranks, and Pearson's r, of the values, of a pair of numbers of n networks."""

    tau: Interval
    r: Interval
    n: int

    @property
    def numbers(self) -> dict[str, Any]:
        """Value and interval of both as plain values."""
        return {"tau": list(astuple(self.tau)), "r": list(astuple(self.r)), "n": self.n}


def associate(x: Sequence[float], y: Sequence[float]) -> Association:
    """Both coefficients of two numbers a network; the bootstrap draws the networks again with replacement.

    Raises:
        DataError: fewer than three networks, or a number that is not finite.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(a) < 3 or len(a) != len(b):
        raise DataError(f"{len(a)} and {len(b)} numbers: a correlation needs at least three pairs.")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise DataError("A correlation needs finite numbers; leave out networks that have none.")
    drawn = np.random.default_rng(0).multinomial(len(a), np.full(len(a), 1 / len(a)), size=RESAMPLES)
    counts = np.concatenate([np.ones((1, len(a))), drawn])
    return Association(_interval(tau(a, b, counts)), _interval(pearson(a, b, counts)), len(a))


def _interval(values: Array) -> Interval:
    """The first value, and the middle of the others; those of resamples without any spread are left out."""
    rest = values[1:][np.isfinite(values[1:])]
    low, high = np.quantile(rest, [TAIL, 1 - TAIL]) if len(rest) else (math.nan, math.nan)
    return Interval(float(values[0]), float(low), float(high))


def tau(x: Array, y: Array, counts: Array) -> Array:
    """Kendall's tau-b of each resample, given how often each pair is in it; shape (resamples,).

    With ``C_ij = sign(x_i - x_j) sign(y_i - y_j)`` and counts w it is ``w'Cw / sqrt(w'|Sx|w w'|Sy|w)``.
    """
    up, right = np.sign(x[:, None] - x), np.sign(y[:, None] - y)

    def within(matrix: Array) -> Array:
        return ((counts @ matrix) * counts).sum(1)

    with np.errstate(invalid="ignore", divide="ignore"):
        return within(up * right) / np.sqrt(within(np.abs(up)) * within(np.abs(right)))


def pearson(x: Array, y: Array, counts: Array) -> Array:
    """Pearson's r of each resample; shape (resamples,)."""
    share = counts / counts.sum(1, keepdims=True)
    a, b = x[None] - (share @ x)[:, None], y[None] - (share @ y)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        return (share * a * b).sum(1) / np.sqrt((share * a * a).sum(1) * (share * b * b).sum(1))
