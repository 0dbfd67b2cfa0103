"""Seconds a step, measured fairly: all algorithms in one process, taking turns on the same batches."""

import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
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
    """Median seconds of a step; its ratio to the first algorithm in the same round: median and quartiles."""

    seconds: float
    ratio: float
    low: float
    high: float


def step_costs(configs: Sequence[RunConfig], *, rounds: int = 41, block: int = 10) -> list[StepCost]:
    """Time a step of each configuration relative to the first, in blocks of consecutive steps (see `in_turns`)."""
    with ExitStack() as stack:
        sessions = [stack.enter_context(closing(build(config))) for config in configs]
        blocks = [partial(_run_block, each, list(islice(each.loader, block))) for each in sessions]
        times = in_turns(blocks, rounds)
    per_step = [[seconds / block for seconds in own] for own in times]
    return [_summarise(own, per_step[0]) for own in per_step]


def _run_block(session: Session, batches: Sequence[Batch]) -> None:
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
    """Seconds of each work by round; all take turns in random order, so that a slow moment hits them alike."""
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


def _summarise(own: Sequence[float], first: Sequence[float]) -> StepCost:
    ratios = sorted(a / b for a, b in zip(own, first, strict=True))
    quarter = len(ratios) // 4
    return StepCost(median(own), median(ratios), low=ratios[quarter], high=ratios[3 * len(ratios) // 4])
