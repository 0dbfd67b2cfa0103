"""Time and peak memory of cross-entropy + kappa in chunks, relative to plain logits and cross-entropy.

    python benchmarks/linear_cross_entropy.py

Contestants take turns, each in a fresh process that measures its own peak of resident memory above that with the
inputs in place. A ratio within a round says more than either time on a machine that others use too.
"""

import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from output import RESULTS, environment, save, show
from relflat.vocabulary.function import linear_cross_entropy_fam

PLAIN = "logits + F.cross_entropy"


@dataclass(frozen=True)
class Options:
    """Cost of linear_cross_entropy_fam relative to logits and cross-entropy.

    Attributes:
        tokens: rows of the features.
        features: columns of them.
        classes: size of the vocabulary.
        rounds: how often each contestant runs.
        chunk_tokens: as in linear_cross_entropy_fam; 0 for its default.
        chunk_classes: as there.
        dtype: of features and weight.
        threads: threads of torch; 0 for its own choice.
        contestants: which to run beside the plain one: a value of gradient, with ", K probes" or without, or "value".
        json: where to write the results.
        only: run this contestant here and print what it took (used by the benchmark itself).
    """

    tokens: int = 8192
    features: int = 1024
    classes: int = 131072
    rounds: int = 2
    chunk_tokens: int = 0
    chunk_classes: int = 4096
    dtype: str = "float32"
    threads: int = 0
    contestants: tuple[str, ...] = ("frozen", "full, 64 probes", "full, 128 probes", "full", "value")
    json: Path = RESULTS / "linear_cross_entropy.json"
    only: str = ""


def main() -> None:
    options = tyro.cli(Options)
    if options.only:
        print(*run(options, options.only))
        return
    where, rows = environment(), {name: [] for name in (PLAIN, *options.contestants)}
    for _ in range(options.rounds):
        for name, found in rows.items():
            found.append(elsewhere(name, sys.argv[1:]))
            print(f"{name}: {found[-1][0]:.1f} s, processor {found[-1][1]:.1f} s, {found[-1][2]:.2f} GiB", flush=True)
    results = {name: summary(found, rows[PLAIN]) for name, found in rows.items()}
    columns = ("forward and backward", "wall time", "processor time", "peak memory", "s", "GiB")
    keys = ("wall_ratio", "processor_ratio", "memory_ratio")
    cells = [
        [n, *(f"{r[k]:.3f}" for k in keys), f"{r['seconds']:.1f}", f"{r['peak_gib']:.2f}"] for n, r in results.items()
    ]
    show(f"{options.tokens} tokens, {options.features} features, {options.classes} classes", columns, cells)
    kept = {k: v for k, v in asdict(options).items() if k not in ("json", "only")}
    save(options.json, {"environment": where, "options": kept, "results": results})
    print(f"written: {options.json}")


def summary(found: list[list[float]], plain: list[list[float]]) -> dict[str, Any]:
    """Medians over rounds of the ratios within a round, and of the numbers themselves."""
    wall, processor, memory = (
        median(own[i] / other[i] for own, other in zip(found, plain, strict=True)) for i in range(3)
    )
    return {
        "wall_ratio": wall,
        "processor_ratio": processor,
        "memory_ratio": memory,
        "seconds": median(x[0] for x in found),
        "peak_gib": median(x[2] for x in found),
        "rounds": found,
    }


def elsewhere(name: str, arguments: Sequence[str]) -> list[float]:
    """Seconds, processor seconds and GiB of a contestant in a process of its own, with such options."""
    command = [sys.executable, __file__, *arguments, "--only", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(x) for x in done.stdout.split()]


def run(options: Options, name: str) -> tuple[float, float, float]:
    """Wall seconds, processor seconds and GiB above the inputs of one step."""
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    x = torch.randn(options.tokens, options.features).to(dtype).requires_grad_()
    w = (torch.randn(options.classes, options.features) / options.features**0.5).to(dtype).requires_grad_()
    y = torch.randint(options.classes, (options.tokens,))
    step = contestant(options, name)
    small = [x[:8].detach().requires_grad_(), w[:64].detach().requires_grad_(), y[:8] % 64]
    step(*small)  # loads what is loaded once
    before, start, used = _resident(), time.perf_counter(), time.process_time()
    step(x, w, y)
    return time.perf_counter() - start, time.process_time() - used, (_peak() - before) / 2**20


def contestant(options: Options, name: str) -> Callable[[Tensor, Tensor, Tensor], None]:
    """A step by name."""
    gradient, _, probes = name.partition(", ")
    value = gradient == "value"
    k = int(probes.removesuffix(" probes")) if probes else None

    def plain(x: Tensor, w: Tensor, y: Tensor) -> None:
        F.cross_entropy(x @ w.T, y).backward()

    def chunked(x: Tensor, w: Tensor, y: Tensor) -> None:
        with torch.set_grad_enabled(not value):
            loss = linear_cross_entropy_fam(
                x,
                w,
                y,
                strength=0.1,
                gradient="full" if value else gradient,
                probes=None if k is None else min(k, x.shape[1]),
                step=0,
                chunk_tokens=options.chunk_tokens or None,
                chunk_classes=options.chunk_classes,
            )
        if not value:
            loss.total.backward()

    return plain if name == PLAIN else chunked


def _resident() -> float:
    """Resident memory now, in KiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1024


def _peak() -> float:
    """Peak of resident memory so far, in KiB."""
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


if __name__ == "__main__":
    main()
