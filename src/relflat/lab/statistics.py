"""What differences over a few seeds can and cannot show.

Runs of the same seed share training data, noise and data order, so differences are taken seed by seed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, stdev

from scipy.stats import t as student

from relflat.errors import DataError


@dataclass(frozen=True)
class Difference:
    """Paired difference of two methods over the same seeds.

    Attributes:
        first: the method whose score the other's is taken from.
        second: the other method.
        mean: mean of ``second - first``.
        low: lower end of the Student interval of the mean; all pairs compared hold together with 95 %.
        high: upper end of it.
        p: two-sided p-value of the paired t-test, corrected by Holm over all pairs compared.
        n: number of seeds.
    """

    first: str
    second: str
    mean: float
    low: float
    high: float
    p: float
    n: int

    @property
    def shown(self) -> bool:
        """Whether the corrected p-value is below 0.05."""
        return self.p < 0.05


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter is nan for a single value."""
    return fmean(values), stdev(values) if len(values) > 1 else math.nan


def differences(scores: Mapping[str, Sequence[float]]) -> list[Difference]:
    """Compare every pair of methods.

    Args:
        scores: for each method one score a seed, in the same order of seeds.

    Raises:
        DataError: the methods have different numbers of scores.
    """
    if len({len(values) for values in scores.values()}) > 1:
        raise DataError(f"Paired scores need the same seeds, got { {k: len(v) for k, v in scores.items()} }.")
    names = list(combinations(scores, 2))
    level = 1 - 0.05 / len(names) if names else 0.95
    pairs = [paired(first, second, scores[first], scores[second], level) for first, second in names]
    corrected = holm([pair.p for pair in pairs])
    return [
        Difference(pair.first, pair.second, pair.mean, pair.low, pair.high, p, pair.n)
        for pair, p in zip(pairs, corrected, strict=True)
    ]


def paired(
    first: str, second: str, a: Sequence[float], b: Sequence[float], level: float = 0.95
) -> Difference:
    """Paired t-test of ``b - a``, p-value not corrected; a sign test where the gaps have no spread."""
    gaps = [y - x for x, y in zip(a, b, strict=True)]
    n, mean = len(gaps), fmean(gaps)
    if n < 2:
        return Difference(first, second, mean, -math.inf, math.inf, 1.0, n)
    error = stdev(gaps) / math.sqrt(n)
    if error == 0:
        return Difference(first, second, mean, mean, mean, 1.0 if mean == 0 else 0.5 ** (n - 1), n)
    half = float(student.ppf((1 + level) / 2, n - 1)) * error
    p = 2 * float(student.sf(abs(mean) / error, n - 1))
    return Difference(first, second, mean, mean - half, mean + half, p, n)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's correction of p-values for several comparisons."""
    corrected = [0.0] * len(p)
    running = 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        running = max(running, min(1.0, (len(p) - rank) * p[place]))
        corrected[place] = running
    return corrected
