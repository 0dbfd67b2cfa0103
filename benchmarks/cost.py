"""What FAM and measuring cost: every row of the table, paired with plain training and SAM in one process.

    python benchmarks/cost.py                              on the CPU
    python benchmarks/cost.py --device cuda                on a GPU: other networks and precisions, under six minutes
    python benchmarks/cost.py --src ../other/src           the same of another version first, as "before"
    python benchmarks/cost.py --small                      tiny networks and few rounds, to see that all of it runs

Contestants take turns in random order; ratios are medians over the rounds (of rows whose steps differ in cost the
ratio of mean times). Operations are counted by the dispatcher, without views and allocations: that many kernels a GPU
would be asked for, at least. Writes cost_DEVICE.json, network by network, and .svg.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from pytorch_optimizer import SAM
from torch import Tensor, nn, optim

from cost_table import COLUMNS, cells_of, draw
from counting import Operations, flops, peak_bytes
from networks import TextEncoder, bert, mlp, pictures, resnet18, sentences, vit
from output import RESULTS, environment, save, show
from paired import ratio_to
from relflat import FAM, relative_flatness_by_layer
from relflat.lab.tasks.models import wide_resnet

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Options:
    """Cost of training and measuring, relative to plain training.

    Attributes:
        device: of torch.
        cases: the networks of which table; by default that of the device.
        rounds: timed rounds of each case.
        only: cases whose name holds this.
        threads: threads of torch; 0 for its own choice.
        small: tiny networks and two rounds.
        src: the sources of another version, measured first in a process of its own.
        json: where to write; by default benchmarks/results/cost_DEVICE.json, and nowhere for small.
    """

    device: str = "cpu"
    cases: Literal["", "cpu", "cuda"] = ""
    rounds: int = 15
    only: str = ""
    threads: int = 0
    small: bool = False
    src: Path | None = None
    json: Path | None = None


@dataclass(frozen=True)
class Case:
    """A network to train and measure.

    Attributes:
        name: in tables.
        build: the network, small or not.
        draw: samples and targets, of a number of samples, small or not.
        batch: samples a step.
        layers: the glob that stands for all layers.
        precision: of autocast; fp16 with a GradScaler.
        goals: what ratios are aimed at, by label.
        measures: whether its layers are measured too.
    """

    name: str
    build: Callable[[bool], nn.Module]
    draw: Callable[[int, bool], tuple[Tensor, Tensor]]
    batch: int
    layers: Any
    goals: dict[str, float]
    precision: str = "fp32"
    measures: bool = False


ROWS: dict[str, dict[str, Any]] = {
    "output": {"layer": "output"},
    "all": {},
    "all, every 4": {"every": 4},
    "one drawn, every 4": {"every": 4, "layers_per_step": 1},
    "default": {},
}
MEASURES: dict[str, dict[str, Any]] = {"GGN, 4 probes": {"curvature": "ggn", "probes": 4}, "by default": {}}
UNEVEN = {"all, every 4": 4, "one drawn, every 4": 4, "default": 8}  # steps until one with a penalty comes again
DRAWS = {"one drawn, every 4": 8}  # of a layer, that counts are means over


def _resnet(small: bool) -> nn.Module:
    return wide_resnet(depth=10, widen=1) if small else resnet18()


CPU = (
    Case(
        "MLP 64-128-128-10",
        lambda small: mlp(64, (128, 128)),
        lambda n, small: (torch.randn(n, 64), torch.randint(10, (n,))),
        32,
        "*",
        {},
    ),
    Case(
        "ResNet-18",
        _resnet,
        lambda n, small: pictures(n, 3, 8 if small else 32),
        32,
        "*",
        {"all": 2.4, "all, every 4": 1.33, "one drawn, every 4": 1.12, "default": 1.15}
        | {"GGN, 4 probes": 4, "by default": 15},
        measures=True,
    ),
    Case(
        "six encoder layers",
        lambda small: TextEncoder(width=16 if small else 192, depth=2 if small else 6),
        lambda n, small: sentences(n, 8 if small else 64),
        32,
        "encoder.layers.*.linear?",
        {"all": 2.3, "all, every 4": 1.33, "default": 1.15},
    ),
)
GPU = (
    *(
        Case(
            f"ResNet-18, {precision}",
            _resnet,
            lambda n, small: pictures(n, 3, 8 if small else 32),
            256,
            "*",
            {"output": 1.03, "all": 2.5, "all, every 4": 1.35, "one drawn, every 4": 1.15, "default": 1.15},
            precision,
            measures=precision == "fp32",
        )
        for precision in PRECISIONS
    ),
    Case("BERT-base, bf16", bert, lambda n, small: sentences(n, 16 if small else 128), 32, "*", {"all": 2.5}, "bf16"),
    Case("ViT-S, bf16", vit, lambda n, small: pictures(n, 3, 32 if small else 224), 64, "*", {"all": 2.5}, "bf16"),
)


class Step:
    """A training step: plain, with SAM, or with FAM."""

    def __init__(self, case: Case, row: str, device: str, small: bool) -> None:
        torch.manual_seed(0)
        self.dtype, self.device = PRECISIONS[case.precision], torch.device(device)
        self.model = case.build(small).to(device).train()
        self.batch = tuple(t.to(device) for t in case.draw(4 if small else case.batch, small))
        self.criterion: nn.Module = nn.CrossEntropyLoss()
        if row in ROWS:
            options = {} if row == "default" else {"layer": case.layers, "strength": 0.1, "seed": 0} | ROWS[row]
            self.criterion = FAM(nn.CrossEntropyLoss(), self.model, **options)
        self._sam, parameters = row == "SAM", list(self.model.parameters())
        sgd = {"lr": 1e-3, "momentum": 0.9, "foreach": True}
        self.optimizer = SAM(parameters, optim.SGD, **sgd) if self._sam else optim.SGD(parameters, **sgd)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=case.precision == "fp16" and not self._sam)

    def step(self) -> None:
        """One update of all weights."""
        self._backward()
        if self._sam:
            self.optimizer.step(self._backward)
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def _backward(self) -> Tensor:
        inputs, targets = self.batch
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            found = self.model(inputs)
            loss: Tensor = self.criterion(getattr(found, "logits", found), targets)
        self.scaler.scale(loss).backward()
        return loss.detach()


class Penalised(Step):
    """One that has a penalty at each step."""

    def step(self) -> None:
        """One update, as if it were the first."""
        self.criterion.step = 0
        super().step()


def clock(step: Callable[[], Any], device: str) -> tuple[float, float]:
    """Wall seconds of a call, until the device is done, and processor seconds."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start, used = time.perf_counter(), time.process_time()
    step()
    wait()
    return time.perf_counter() - start, time.process_time() - used


def in_turns(steps: dict[str, Callable[[], Any]], options: Options, again: dict[str, int]) -> list[dict[str, Any]]:
    """Wall and processor seconds by label, a number a round; means of ``again`` calls in a row for some."""
    order, clocks = random.Random(0), [{label: [] for label in steps} for _ in range(2)]
    for turn in range(options.rounds + 1):
        for label in order.sample(list(steps), len(steps)):
            count = again.get(label, 1)
            seconds = clock(lambda label=label, count=count: [steps[label]() for _ in range(count)], options.device)
            for found, value in zip(clocks, seconds, strict=True):
                found[label] += [value / count] if turn else []  # the first warms up
    return clocks


def train(case: Case, options: Options) -> list[dict[str, Any]]:
    """Rows of training a network."""
    labels, firsts, failed = ["plain", "plain again", "SAM", *ROWS], {}, {}
    steps: dict[str, Step] = {}
    for label in labels:
        try:
            steps[label] = Step(case, label, options.device, options.small)
            firsts[label] = clock(steps[label].step, options.device)[0]
            steps[label].step()
        except (RuntimeError, ImportError) as error:
            failed[label] = f"{type(error).__name__}: {error}".splitlines()[0]
            steps.pop(label, None)
    wall, processor = in_turns({label: s.step for label, s in steps.items()}, options, UNEVEN)
    rows, plain = [], {}
    for label, step in steps.items():
        count = UNEVEN.get(label, 1) * (1 if options.small else DRAWS.get(label, 1))
        seen: dict[str, Any] = counts(step, count) | {"peak": peak(case, label, options)}
        plain = plain or seen
        report = getattr(step.criterion, "last", {})
        rows.append(
            {"case": case.name, "row": label, "first_step": firsts[label], "method": report.get("method", "")}
            | {name: value and value / plain[name] if name != "operations" else value for name, value in seen.items()}
            | {"wall": asdict(ratio_to(wall[label], wall["plain"]))}
            | {"processor": asdict(ratio_to(processor[label], processor["plain"]))}
            | {"goal": case.goals.get(label)}
        )
    return rows + [{"case": case.name, "row": label, "cannot_run": why} for label, why in failed.items()]


def counts(step: Step, number: int) -> dict[str, float]:
    """Operations and FLOPs of a step, means over so many."""
    operations = Operations()

    def steps() -> None:
        with operations:
            for _ in range(number):
                step.step()

    work = flops(steps)
    return {"operations": operations.total / number, "flops": work / number}


def peak(case: Case, label: str, options: Options) -> float | None:
    """Peak bytes of the third step; all have a penalty if any has."""

    def build() -> Step:
        return (Penalised if label in UNEVEN else Step)(case, label, options.device, options.small)

    if not options.device.startswith("cuda"):
        return float(peak_bytes(build, warm_up=2))
    step = build()
    step.step()
    step.step()
    torch.cuda.reset_peak_memory_stats()
    step.step()
    return float(torch.cuda.max_memory_allocated())


def measure(case: Case, options: Options) -> list[dict[str, Any]]:
    """Rows of measuring all layers, in training passes."""
    plain, rows = Step(case, "plain", options.device, options.small), []
    plain.step()
    runs: dict[str, Callable[[], Any]] = {"plain": plain._backward}
    for label, arguments in MEASURES.items():
        runs[label] = partial(_by_layer, plain, case, arguments)
    few = Options(**{**asdict(options), "rounds": 1 if options.small else min(3, options.rounds)})
    found: dict[str, Any] = {}
    ratios, passes = {}, flops(plain._backward)
    for label in MEASURES:
        work = flops(lambda label=label: found.update({label: runs[label]()}))
        ratios[label] = work / passes
    wall, processor = in_turns(runs, few, {})
    for label in MEASURES:
        errors = sorted(f.stderr / abs(f.value) for f in found[label].values())
        rows.append(
            {"case": case.name, "row": label, "median_error": errors[len(errors) // 2], "layers": len(errors)}
            | {"flops": ratios[label], "goal": case.goals.get(label)}
            | {"wall": asdict(ratio_to(wall[label], wall["plain"]))}
            | {"processor": asdict(ratio_to(processor[label], processor["plain"]))}
        )
    return rows


def _by_layer(step: Step, case: Case, arguments: dict[str, Any]) -> Any:
    return relative_flatness_by_layer(step.model, nn.CrossEntropyLoss(), step.batch, layer=case.layers, **arguments)


def before(options: Options) -> list[dict[str, Any]]:
    """The rows of another version, by this script in a process with its sources."""
    if options.src is None:
        return []
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "found.json"
        given = {**asdict(options), "json": path}
        words = [w for k, v in given.items() if k not in ("src", "small") and v != "" for w in (f"--{k}", str(v))]
        words += ["--small"] if options.small else []
        env = os.environ | {"PYTHONPATH": str(options.src.resolve())}
        subprocess.run([sys.executable, __file__, *words], env=env, check=True)
        rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, show and write; the command line's arguments by default."""
    options = tyro.cli(Options, args=arguments)
    options = Options(**{**asdict(options), "rounds": 2}) if options.small else options
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=UserWarning)
    old, where, rows = before(options), environment(), []
    cases = GPU if (options.cases or options.device).startswith("cuda") else CPU
    path = options.json or RESULTS / f"cost_{options.device}.json"
    for case in [c for c in cases if options.only in c.name]:
        for work in (train, measure) if case.measures else (train,):
            rows += work(case, options)
            if options.json or not options.small:
                save(path, {"environment": where, "rounds": options.rounds, "rows": rows, "before": old})
    by_name = {(row["case"], row["row"]): row for row in old}
    cells = [cells_of(row, by_name.get((row["case"], row["row"]), {})) for row in rows]
    show(f"Relative to a plain step, {options.device}", COLUMNS, cells)
    if options.json or not options.small:
        draw(rows, by_name, path.with_suffix(".svg"))
        print(f"written: {path}")


if __name__ == "__main__":
    main()
