"""What differences over a few seeds can and cannot show.

Runs of the same seed share training data, noise and data order, so differences are taken seed by seed. Every
arm is held against the first one. The verdict goes by a permutation test, which assumes only that without an
effect each seed's difference could as well have had the other sign.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
from scipy.stats import bootstrap, permutation_test

from relflat.errors import DataError

RESAMPLES = 9999
LEVEL = 0.05


@dataclass(frozen=True)
class Difference:
    """Paired difference of two arms over the same seeds."""

    first: str
    second: str
    mean: float  # of second - first
    low: float  # of the BCa bootstrap interval of the mean, 95 % for all pairs together (Bonferroni)
    high: float
    p: float  # two-sided, of the sign-flip permutation test, corrected by Holm over all pairs
    least_p: float  # the smallest value p could have had with so few seeds
    n: int  # number of seeds

    @property
    def shown(self) -> bool:
        """Whether the corrected p-value is below 0.05."""
        return self.p < LEVEL


def mean_sd(values: Sequence[float | None]) -> tuple[float, float]:
    """Mean and sample standard deviation, nan for one value; both nan without values, or where one is not known."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    if not known or len(known) < len(values):
        return math.nan, math.nan
    return fmean(known), stdev(known) if len(known) > 1 else math.nan


def differences(scores: Mapping[str, Sequence[float]]) -> list[Difference]:
    """Hold every arm against the first; each has one score a seed, in the same order of seeds."""
    if len({len(values) for values in scores.values()}) > 1:
        raise DataError(f"Paired scores need the same seeds, got { {k: len(v) for k, v in scores.items()} }.")
    first, *others = scores
    gaps = {name: [b - a for a, b in zip(scores[first], scores[name], strict=True)] for name in others}
    # Holm (1979) rather than Bonferroni: it rejects at least as much, and it too holds whatever the dependence of the
    # tests; they do depend on each other, as all share the first arm. Intervals that agree with Holm's tests say
    # next to nothing of the arms that differ (Strassburger and Bretz, 2008), so those are Bonferroni's.
    corrected = holm([sign_flip(values) for values in gaps.values()])
    found = []
    for (name, values), p in zip(gaps.items(), corrected, strict=True):
        low, high = bca(values, 1 - LEVEL / len(others))
        least = min(1.0, len(others) * least_p(len(values)))
        found.append(Difference(first, name, fmean(values), low, high, p, least, len(values)))
    return found


def sign_flip(gaps: Sequence[float]) -> float:
    """Two-sided p-value of the mean under random signs: all of them up to 13 gaps, else a random sample."""
    # Fisher's (1935) test. A t-test would assume normal differences, which a handful of seeds cannot check, and
    # Wilcoxon's ranks would leave out how large the differences are.
    if len(gaps) < 2 or not any(gaps):
        return 1.0
    found = permutation_test((np.asarray(gaps),), np.mean, permutation_type="samples", n_resamples=RESAMPLES, rng=0)
    return float(found.pvalue)


def least_p(n: int) -> float:
    """The smallest p-value that ``sign_flip`` can give for ``n`` gaps."""
    # Of 2^n signs two are the most extreme, all + and all -. A random sample counts the data themselves as one more
    # draw, so that p is never 0 (Phipson and Smyth, 2010), and takes twice the smaller tail.
    return 1.0 if n < 2 else max(2.0 ** (1 - n), 2 / (RESAMPLES + 1))


def seeds_needed(pairs: int) -> int:
    """The fewest seeds with which any of so many pairs could be told apart, all differences of one sign."""
    n = 2
    while pairs * least_p(n) >= LEVEL:
        n += 1
    return n


def bca(gaps: Sequence[float], level: float) -> tuple[float, float]:
    """BCa bootstrap interval of the mean; the point itself where the gaps have no spread."""
    # Bias-corrected and accelerated (Efron, 1987, doi:10.1080/01621459.1987.10478410): of the bootstrap's intervals
    # the one that follows the skew of accuracies near 100 %. With few seeds it is too narrow, like all that resample
    # (Hesterberg, 2015, doi:10.1080/00031305.2015.1089789), so the verdict goes by p.
    if len(gaps) < 2:
        return -math.inf, math.inf
    if max(gaps) == min(gaps):
        return gaps[0], gaps[0]
    found = bootstrap(
        (np.asarray(gaps),), np.mean, confidence_level=level, n_resamples=RESAMPLES, method="BCa", rng=0
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's correction of p-values for several comparisons (https://www.jstor.org/stable/4615733)."""
    order = np.argsort(p, kind="stable")
    times = np.arange(len(p), 0, -1)  # the smallest p-value times all of them, the next times one less
    corrected = np.maximum.accumulate(np.minimum(1.0, times * np.asarray(p)[order]))
    return corrected[np.argsort(order)].tolist()
