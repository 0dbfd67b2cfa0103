"""What a training step and a measurement cost with two versions of the library, in turns on one machine.

    python tools/step_cost_pair.py --old OLD --new NEW --rounds 20

Two processes stay alive, one for each version (folders that hold ``src/relflat``), and work one at a time on one
thread: old, new, new, old in a round and the other way round in the next, so that whatever slows the machine slows
both. Reported are median ratios of processor time and of wall time over the rounds with their bootstrap intervals
(95 %). Each start of the processes has a bias of its own, as memory is laid out by chance; several are pooled.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

BLOCK = 0.25  # seconds of processor time that a block of steps takes, about
Step = Callable[[], Any]
Problem = tuple[nn.Module, Tensor, list[str]]  # a network, inputs, and all layers to regularise together


# -- the worker: the only part that loads the library --------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions with batch normalisation, and what skips them."""

    def __init__(self, m: int, d: int) -> None:
        super().__init__()
        stride = d // m
        self.one = nn.Conv2d(m, d, 3, stride, 1, bias=False)
        self.two = nn.Conv2d(d, d, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(d), nn.BatchNorm2d(d)])
        self.skip = nn.Identity() if m == d else nn.Conv2d(m, d, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        h = self.norms[0](self.one(x)).relu()
        return (self.norms[1](self.two(h)) + self.skip(x)).relu()


class Encoder(nn.Module):
    """Token embedding, two transformer blocks, mean over tokens and a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        block = nn.TransformerEncoderLayer(64, 4, 128, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.output = nn.Linear(64, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits."""
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivative
            return self.output(self.encoder(self.embedding(tokens)).mean(1))


def mlp() -> Problem:
    """64-128-128-10, 32 samples."""
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(*layers), torch.randn(32, 64), ["*"]


def resnet() -> Problem:
    """ResNet-18 of a quarter of its width, 8 pictures of 32 x 32."""
    widths = [16, 16, 16, 32, 32, 64, 64, 128, 128]
    blocks = [Residual(m, d) for m, d in pairwise(widths)]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    end = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)]
    return nn.Sequential(*stem, *blocks, *end), torch.randn(8, 3, 32, 32), ["*"]


def transformer() -> Problem:
    """The encoder, 8 sentences of 32 tokens; the projections of attention are not called as modules."""
    return Encoder(), torch.randint(256, (8, 32)), ["*linear1", "*linear2", "output"]


def training(build: Callable[[], Problem], layer: str | None) -> Step:
    """A step of training, with FAM if there is a layer; ``"*"`` stands for all of them."""
    from relflat import FAM

    torch.manual_seed(0)
    model, x, every = build()
    y, plain = torch.randint(10, (len(x),)), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    which = every if layer == "*" else layer
    criterion = plain if which is None else FAM(plain, model, which, strength=0.01)

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()

    return step


def measuring(build: Callable[[], Problem], **options: Any) -> Step:
    """A measurement of all layers on the batch."""
    from relflat import relative_flatness_by_layer

    torch.manual_seed(0)
    model, x, every = build()
    data = (x, torch.randint(10, (len(x),)))
    return lambda: relative_flatness_by_layer(model, nn.CrossEntropyLoss(), data, layer=every, **options)


NETWORKS = {"mlp": mlp, "resnet": resnet, "transformer": transformer}
ROWS: dict[str, Callable[[], Step]] = {
    f"{name}, {layer or 'plain'}": partial(training, build, layer)
    for name, build in NETWORKS.items()
    for layer in (None, "output", "*")
}
ROWS["mlp, measure *"] = partial(measuring, mlp)
ROWS["resnet, measure *"] = partial(measuring, resnet, curvature="ggn", probes=2)


def work() -> None:
    """Take orders ``{"row", "steps"}`` on standard input, a line each, and answer with the seconds they took."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    steps: dict[str, Step] = {}
    for line in sys.stdin:
        order = json.loads(line)
        if order["row"] not in steps:
            steps[order["row"]] = ROWS[order["row"]]()
        step = steps[order["row"]]
        wall, used = time.perf_counter(), time.process_time()
        for _ in range(order["steps"]):
            step()
        answer = {"wall": time.perf_counter() - wall, "processor": time.process_time() - used}
        print(json.dumps(answer), flush=True)


# -- the parent ----------------------------------------------------------------------------------------------


class Worker:
    """A process that works with one version."""

    def __init__(self, tree: Path) -> None:
        source = tree / "src" if (tree / "src").is_dir() else tree
        environment = {**os.environ, "PYTHONPATH": str(source.resolve()), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--worker"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=environment, **pipes)

    def __call__(self, row: str, steps: int) -> dict[str, float]:
        """Seconds of wall and processor time of so many steps of a row."""
        assert self._process.stdin is not None and self._process.stdout is not None  # noqa: PT018
        self._process.stdin.write(json.dumps({"row": row, "steps": steps}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a worker failed: its error is above")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@dataclass(frozen=True)
class Ratio:
    """Median ratio new to old with its bootstrap interval."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: list[float]) -> "Ratio":
        """Of the ratios of single rounds."""
        values, rng = np.array(ratios), np.random.default_rng(0)
        again = np.median(rng.choice(values, (4000, len(values))), axis=1)
        return cls(float(np.median(values)), *map(float, np.quantile(again, [0.025, 0.975])))

    def __str__(self) -> str:
        """Ratio and interval."""
        return f"{self.middle:.3f} [{self.low:.3f}, {self.high:.3f}]"


def time_rows(old: Worker, new: Worker, wanted: list[str], rounds: int, found: dict[str, list[Any]]) -> None:
    """Rounds of all rows with one pair of processes; adds the seconds a step (old, new) of each to ``found``."""
    steps = {}
    for row in wanted:
        for worker in (old, new):
            worker(row, 3)
        steps[row] = max(1, round(BLOCK / old(row, 2)["processor"] * 2))
        new(row, 2)
    for turn in range(rounds):
        for row in wanted:
            order = [old, new, new, old] if turn % 2 else [new, old, old, new]
            sums = {old: defaultdict(float), new: defaultdict(float)}
            for worker in order:
                for clock, seconds in worker(row, steps[row]).items():
                    sums[worker][clock] += seconds / (2 * steps[row])
            found[row].append((sums[old], sums[new]))
        print(f"round {turn + 1} of {rounds}", file=sys.stderr)


def main() -> None:
    """Time and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, help="folder of the old version")
    parser.add_argument("--new", type=Path, default=Path(__file__).resolve().parents[1], help="of the new one")
    parser.add_argument("--rounds", type=int, default=12, help="rounds of each start")
    parser.add_argument("--starts", type=int, default=3, help="pairs of processes, one after the other")
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return
    if options.old is None:
        parser.error("--old is needed")
    found: dict[str, list[Any]] = defaultdict(list)
    for _ in range(options.starts):
        old, new = Worker(options.old), Worker(options.new)
        time_rows(old, new, [r for r in ROWS if options.rows in r], options.rounds, found)
        old.close(), new.close()
    print("| step | old, ms | new / old, processor time | new / old, wall time |\n|---|---|---|---|")
    for row, pairs in found.items():
        ratios = [Ratio.of([n[c] / o[c] for o, n in pairs]) for c in ("processor", "wall")]
        print(f"| {row} | {1e3 * np.median([o['processor'] for o, _ in pairs]):.2f} | {ratios[0]} | {ratios[1]} |")
    if options.json:
        options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
