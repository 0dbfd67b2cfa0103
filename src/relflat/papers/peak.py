"""The most memory that work takes at a time."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak(work: Callable[[], object], device: torch.device) -> float | None:
    """Most megabytes at a time while it runs, above what was in use before; None where nothing tells.

    On a CPU it is the process's resident memory, whose mark Linux lets a process reset, after the allocator was
    asked to give back what it had kept from earlier work. What it kept is missing: small numbers are too small.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
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
