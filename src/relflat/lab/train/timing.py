"""Seconds a step, measured fairly: all algorithms in one process, taking turns on the same batches."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median

from relflat.lab.data.batches import Batch
from relflat.lab.train.session import Session, build
from relflat.lab.train.settings import RunConfig


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

    Each round times ``block`` consecutive steps of every configuration; the order within a round rotates,
    so that a slow moment of the machine hits all of them alike. The first rounds warm up and are dropped.

    Args:
        configs: what to time; ratios are to the first.
        rounds: number of rounds that count.
        block: steps a configuration and round.
    """
    sessions = [build(config) for config in configs]
    times: list[list[float]] = [[] for _ in sessions]
    warm_up = 3
    try:
        batches = [list(islice(iter(session.loader), block)) for session in sessions]
        for turn in range(rounds + warm_up):
            for place in range(len(sessions)):
                which = (place + turn) % len(sessions)
                times[which].append(time_block(sessions[which], batches[which]))
    finally:
        for session in sessions:
            session.close()
    first, *_ = kept = [own[warm_up:] for own in times]
    return [summarise(own, first) for own in kept]


def time_block(session: Session, batches: Sequence[Batch]) -> float:
    """Seconds a step over a few consecutive steps."""
    step = session.config.settings.step
    session.training()
    start = time.perf_counter()
    for inputs, targets in batches:
        losses = step(session.learner, inputs, targets)
    float(losses.total)  # waits for the device
    return (time.perf_counter() - start) / len(batches)


def summarise(own: Sequence[float], first: Sequence[float]) -> StepCost:
    """Medians and quartiles over the rounds."""
    ratios = sorted(a / b for a, b in zip(own, first, strict=True))
    quarter = len(ratios) // 4
    return StepCost(median(own), median(ratios), low=ratios[quarter], high=ratios[3 * len(ratios) // 4])
