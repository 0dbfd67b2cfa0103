"""Fair timing on a machine that others use too: contestants take turns in one process, in random order.

Whatever slows the machine for a while slows all of a round alike, so the ratio within a round says more than
either time. What is reported is the median ratio over the rounds, with its bootstrap interval: once of wall
time and once of the processor time that the process used, which other processes cannot take away. With several
threads the latter contains waiting at barriers; with one it is the steadier of the two.
"""

import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track
from scipy.stats import bootstrap

WARM_UP = 3
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Ratio:
    """Time relative to the first contestant.

    Attributes:
        seconds: median time; mean time of a contestant whose calls differ in cost.
        ratio: median over the rounds of own time over the first's in the same round; or mean over mean.
        low: lower end of its 95 % bootstrap interval.
        high: its upper end.
        rounds: how many rounds there were.
    """

    seconds: float
    ratio: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        """Ratio and interval."""
        return f"{self.ratio:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Times:
    """Both clocks' ratios."""

    wall: Ratio
    processor: Ratio


def compare(
    contestants: Mapping[str, Callable[[], Any]], rounds: int, *, seed: int = 0, uneven: Collection[str] = ()
) -> dict[str, Times]:
    """Time contestants in turns; ratios are to the first of them.

    Args:
        contestants: what to call, by name.
        rounds: rounds that count; a few more warm up.
        seed: of the order and the bootstrap.
        uneven: contestants whose calls differ in cost: their ratio is of mean times, not the median ratio.
    """
    clocks = _run(contestants, rounds, random.Random(seed))
    first = next(iter(contestants))
    return {
        name: Times(*(ratio_to(clock[name], clock[first], seed, name in uneven) for clock in clocks))
        for name in contestants
    }


def _run(
    contestants: Mapping[str, Callable[[], Any]], rounds: int, order: random.Random
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall and processor seconds of every contestant and round."""
    wall: dict[str, list[float]] = {name: [] for name in contestants}
    processor: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in track(range(WARM_UP + rounds), "timing", console=Console(stderr=True), transient=True):
        for name in order.sample(list(contestants), len(contestants)):
            start, used = time.perf_counter(), time.process_time()
            contestants[name]()
            if turn >= WARM_UP:
                wall[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - used)
    return wall, processor


def ratio_to(own: Sequence[float], first: Sequence[float], seed: int = 0, uneven: bool = False) -> Ratio:
    """Median ratio of paired times, or if ``uneven`` ratio of their means, with its bootstrap interval."""

    def statistic(a: Array, b: Array, axis: int = -1) -> Array:
        if uneven:
            return np.asarray(np.mean(a, axis) / np.mean(b, axis))
        return np.asarray(np.median(a / b, axis))

    pair = (np.array(own), np.array(first))
    middle = float(statistic(*pair))
    low = high = middle
    if np.ptp(pair[0] / pair[1]):
        rng = np.random.default_rng(seed)
        found = bootstrap(pair, statistic, paired=True, vectorized=True, method="percentile", rng=rng)
        low, high = map(float, found.confidence_interval)
    return Ratio(float(np.mean(own)) if uneven else median(own), middle, low, high, len(own))
