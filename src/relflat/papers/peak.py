"""Time and peak memory of contestants that take turns in one process."""

import ctypes
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Use:
    """What a contestant used.

    Attributes:
        seconds: median over the rounds; of the processor on the CPU, of the clock on a GPU.
        megabytes: most memory at a time above what was in use before, on the device; None where that is not known.
    """

    seconds: float
    megabytes: float | None


def race(
    contestants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, Use]:
    """Time all of them in turns, in random order, and take the memory of a first, untimed turn.

    Args:
        contestants: what to run, by name.
        rounds: timed turns of each.
        device: where they compute.
    """
    memory = {name: peak(work, device) for name, work in contestants.items()}
    order, rng = list(contestants), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            times[name].append(seconds(contestants[name], device))
    return {name: Use(median(times[name]), memory[name]) for name in contestants}


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one run. On a CPU it is the time this process had, which others cannot take away."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    wait(device)
    start = clock()
    work()
    wait(device)
    return clock() - start


def wait(device: torch.device) -> None:
    """Until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(work: Callable[[], object], device: torch.device) -> float | None:
    """Most megabytes at a time while it runs, above what was in use before; None where nothing tells.

    On a CPU it is the process's resident memory, whose mark Linux lets a process reset, after the allocator was
    asked to give back what it had kept from earlier work. What it kept is missing: small numbers are too small.
    """
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        wait(device)
        return float(torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        trim()
        REFERENCES.write_text("5")
        before = _kilobytes("VmRSS")
        work()
        return max(0, _kilobytes("VmHWM") - before) / 2**10
    except OSError:
        work()
        return None


def trim() -> None:
    """Ask the C library to return freed memory to the system, where it knows how."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def _kilobytes(key: str) -> int:
    """A line of the process's status."""
    lines = STATUS.read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])
