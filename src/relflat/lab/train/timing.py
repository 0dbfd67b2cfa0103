"""Seconds a step, measured fairly: all algorithms in one process, taking turns on the same batches."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from statistics import median

import torch

from relflat.lab.data.batches import Batch
from relflat.lab.train.config import RunConfig
from relflat.lab.train.session import Session, build


@dataclass(frozen=True)
class StepCost:
    """What a step of one algorithm costs.

    Attributes:
        seconds: median over the rounds.
        ratio: median over the rounds of the ratio to the first algorithm in the same round.
        low: first quartile of that ratio.
        high: third quartile of that ratio.
    """

    seconds: float
    ratio: float
    low: float
    high: float


def step_costs(configs: Sequence[RunConfig], *, rounds: int = 41, block: int = 10) -> list[StepCost]:
    """Time a step of each configuration relative to the first.

    Each round times ``block`` consecutive steps of every configuration (see `in_turns`).

    Args:
        configs: what to time; ratios are to the first.
        rounds: number of rounds that count.
        block: steps a configuration and round.
    """
    sessions = [build(config) for config in configs]
    try:
        blocks = [partial(run_block, each, list(islice(iter(each.loader), block))) for each in sessions]
        times = in_turns(blocks, rounds)
    finally:
        for session in sessions:
            session.close()
    per_step = [[seconds / block for seconds in own] for own in times]
    return [summarise(own, per_step[0]) for own in per_step]


def run_block(session: Session, batches: Sequence[Batch]) -> None:
    """Do a few consecutive steps."""
    step = session.config.settings.step
    session.training()
    for inputs, targets in batches:
        losses = step(session.learner, inputs, targets)
    float(losses.total)  # waits for the device


def in_turns(
    works: Sequence[Callable[[], object]],
    rounds: int,
    *,
    warm_up: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Time each work once a round, in random order, so that a slow moment of the machine hits all of them alike.

    Args:
        works: what to do.
        rounds: that count.
        warm_up: rounds before them, which do not.
        clock: tells the time, in seconds.

    Returns:
        For each work its times, one a round.
    """
    times: list[list[float]] = [[] for _ in works]
    order = random.Random(0)
    for turn in range(warm_up + rounds):
        for place in order.sample(range(len(works)), len(works)):
            start = clock()
            works[place]()
            if turn >= warm_up:
                times[place].append(clock() - start)
    return times


def clock_of(device: torch.device) -> Callable[[], float]:
    """On a CPU the time this process had, which others cannot take away; else the time when the device is done."""
    if device.type == "cpu":
        return time.process_time

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def summarise(own: Sequence[float], first: Sequence[float]) -> StepCost:
    """Medians and quartiles over the rounds."""
    ratios = sorted(a / b for a, b in zip(own, first, strict=True))
    quarter = len(ratios) // 4
    return StepCost(median(own), median(ratios), low=ratios[quarter], high=ratios[3 * len(ratios) // 4])
