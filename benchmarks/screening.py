"""Many small networks trained at once, to choose FAM's default and to see where it ends: digits and tables.

An implementation of its own: MLPs of width 128-128 as batched products, kappa from the formulas on paper
(Gauss-Newton; in hidden layers along a random direction a sample), so that hundreds of trainings take minutes.
tests/benchmarks/test_screening.py holds it against relflat.FAM.

python benchmarks/screening.py choose  --tables DIR --out screening.jsonl    # candidates, on validation data
python benchmarks/screening.py default --tables DIR --out default.jsonl      # the default and plain, on test data
python benchmarks/screening.py tried   --tables DIR --out tried.jsonl        # other bounds, on validation data
python benchmarks/screening.py show screening.jsonl

DIR holds dna.npz, shuttle.npz, vehicle.npz and vowel.npz with x and y (Statlog and UCI tables, as in R's mlbench).
Interrupted, the same command goes on where it stopped.
"""

import argparse
import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from relflat.sizing import BOUND, EVERY, SIZE

BATCH = {"digits": 32, "vehicle": 32, "vowel": 32, "dna": 64, "shuttle": 64}
LR = {"sgd": 0.05, "adamw": 1e-3}
EPOCHS, WIDTH, AT_MOST = 40, 128, 3000


@dataclass(frozen=True)
class Method:
    """A size of 0 is plain training, or SAM if there is a rho."""

    name: str
    size: float = 0.0
    bound: float = math.inf
    every: int = 1
    by_features: bool = False  # size / (2 m) of each layer in place of size / layers
    rho: float = 0.0
    smoothing: float = 0.0
    along: float = math.inf  # the largest norm of the penalty's gradient, in norms of the task's
    projected: bool = False  # without what of the penalty's gradient goes against the task's


def fam(size: float, bound: float, every: int = EVERY, **how: float) -> Method:
    """A candidate, named by its numbers."""
    extra = "".join(f" {k}" + ("" if v is True else f" {v:g}") for k, v in how.items() if v)
    return Method(f"size {size:g} bound {bound:g} every {every}{extra}", size, bound, every, **how)  # type: ignore[arg-type]


PLAIN, SAM = Method("plain"), Method("SAM 0.05", rho=0.05)
CANDIDATES = (
    PLAIN,
    *(fam(size, bound) for size, bound in itertools.product((0.001, 0.004, 0.016), (0.1, 0.3, 0.8, 2.4))),
    *(fam(0.004, bound, every) for bound, every in ((0.0375, 1), (0.15, 4), (1.2, 4), (math.inf, 4))),
    fam(0.1, 0.3, by_features=True),
    SAM,
)
DEFAULT = (PLAIN, fam(SIZE, BOUND, EVERY))
TRIED = (
    *DEFAULT,
    *(fam(0.004, bound) for bound in (1.2, 2.4, math.inf)),
    fam(SIZE, BOUND, projected=True),
    fam(0.016, math.inf, along=1.0),
    fam(0.016, math.inf, along=1.0, projected=True),
)


@dataclass(frozen=True)
class Cell:
    """What is trained on, and how."""

    task: str
    noise: float
    optimizer: str
    rate: float  # times the usual learning rate
    loss: str  # "cross-entropy" or "squares"


@dataclass(frozen=True)
class Data:
    """Training and held-out samples, and the number of classes."""

    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor
    classes: int


def data(cell: Cell, seed: int, tables: Path, *, test: bool) -> Data:
    """Half to train on (3,000 at most), a quarter to validate, a quarter to test; inputs standardised."""
    if cell.task == "digits":
        x, y = load_digits(return_X_y=True)
    else:
        file = np.load(tables / f"{cell.task}.npz")
        x, y = file["x"], file["y"]
    rng, n = np.random.default_rng(1000 + seed), len(x)
    order, middle = rng.permutation(n), n // 2 + n // 4
    train, held = order[: min(n // 2, AT_MOST)], order[middle:] if test else order[n // 2 : middle]
    mean, std = (0.0, 16.0) if cell.task == "digits" else (x[train].mean(0), x[train].std(0) + 1e-6)
    classes, labels = int(y.max()) + 1, y[train].astype(np.int64)
    wrong = rng.random(len(labels)) < cell.noise
    labels[wrong] = rng.integers(0, classes, wrong.sum())

    def inputs(rows: Any) -> Tensor:
        return torch.tensor((x[rows] - mean) / std, dtype=torch.float32)

    return Data(inputs(train), torch.tensor(labels), inputs(held), torch.tensor(y[held].astype(np.int64)), classes)


class Networks:
    """MLPs side by side: weights (R, d, m), biases (R, 1, d)."""

    def __init__(self, seeds: Sequence[int], sizes: Sequence[int], loss: str) -> None:
        self.sizes, self.loss, self.parameters = sizes, loss, []
        for layer, (m, d) in enumerate(itertools.pairwise(sizes)):
            drawn = {seed: torch.Generator().manual_seed(7919 * seed + layer) for seed in set(seeds)}
            uniform = {s: (2 * torch.rand(d, m + 1, generator=g) - 1) / math.sqrt(m) for s, g in drawn.items()}
            self.parameters.append(torch.stack([uniform[s][:, :m] for s in seeds]).contiguous().requires_grad_())
            self.parameters.append(torch.stack([uniform[s][None, :, m] for s in seeds]).contiguous().requires_grad_())

    def features(self, x: Tensor) -> list[Tensor]:
        """The input of every layer, and the outputs."""
        found = [x]
        for weight, bias in zip(self.parameters[::2], self.parameters[1::2], strict=True):
            z = torch.baddbmm(bias, found[-1], weight.mT)
            found.append(z if weight is self.parameters[-2] else z.relu())
        return found

    def task(self, z: Tensor, y: Tensor, smoothing: Tensor | float = 0.0) -> Tensor:
        """The mean loss of each network."""
        if self.loss == "squares":
            return (z - F.one_hot(y, z.shape[-1])).square().mean((1, 2))
        logs = z.log_softmax(-1)
        right = -logs.gather(-1, y[..., None]).squeeze(-1).mean(1)
        return (1 - smoothing) * right - smoothing * logs.mean((1, 2))

    def quadratic(self, z: Tensor, t: Tensor) -> Tensor:
        """``t' H t`` of each sample, H the Hessian of its loss in its outputs."""
        if self.loss == "squares":
            return 2 * t.square().mean(-1)
        p = z.softmax(-1)
        return (p * t * t).sum(-1) - (p * t).sum(-1).square()

    def kappas(self, features: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
        """Of every layer: the mean of ``||phi||^2 (J W a)' H (J W a)``, a of random signs; its mean in the last."""
        z, found = features[-1], []
        for layer, (phi, weight) in enumerate(zip(features, self.parameters[::2], strict=False)):
            norms = phi.square().sum(-1)
            if layer == len(self.sizes) - 2:
                columns = weight.mT[:, :, None]  # (R, m, 1, d): the trace over W' H W, column by column
                found.append((norms * self.quadratic(z[:, None], columns).sum(1)).mean(1))
                continue
            signs = torch.randint(2, (1, phi.shape[1], weight.shape[2]), generator=generator) * 2.0 - 1
            t = signs.expand(len(weight), -1, -1) @ weight.mT
            for later, after in zip(features[layer + 1 :], self.parameters[2 * layer + 2 :: 2], strict=False):
                t = (t * (later > 0)) @ after.mT
            found.append((norms * self.quadratic(z, t)).mean(1))
        return found


def train(cell: Cell, runs: Sequence[tuple[int, Method]], tables: Path, *, test: bool) -> list[dict[str, Any]]:
    """Train one network for each seed and method, and say how it does on held-out data."""
    seeds = sorted({seed for seed, _ in runs})
    sets = [data(cell, seed, tables, test=test) for seed in seeds]
    place = torch.tensor([seeds.index(seed) for seed, _ in runs])
    x, y = torch.stack([s.x for s in sets]), torch.stack([s.y for s in sets])
    nets = Networks([s for s, _ in runs], (x.shape[2], WIDTH, WIDTH, sets[0].classes), cell.loss)
    methods = [m for _, m in runs]

    def each(name: str) -> Tensor:
        return torch.tensor([float(getattr(m, name)) for m in methods])

    share = torch.stack(
        [torch.where(each("by_features") > 0, each("size") / (2 * m), each("size") / 3) for m in nets.sizes[:3]]
    )
    every, rho = each("every"), each("rho")
    most = each("bound") / every
    update, orders = Optimizer(cell, nets.parameters), [torch.Generator().manual_seed(s) for s in seeds]
    signs, acted, penalties = torch.Generator().manual_seed(12345), torch.zeros(len(runs)), torch.zeros(len(runs))
    size, n = BATCH[cell.task], x.shape[1]
    for step in range(steps := EPOCHS * (n // size)):
        if step % (n // size) == 0:
            order = torch.stack([torch.randperm(n, generator=g) for g in orders])
        rows = order[:, step % (n // size) * size :][:, :size]
        inputs, targets = (a[torch.arange(len(seeds))[:, None], rows][place] for a in (x, y))
        features = nets.features(inputs)
        losses = nets.task(features[-1], targets, each("smoothing"))
        total, now = losses.sum(), (each("size") > 0) & (step % every == 0)
        if bool(now.any()):
            penalty = (share * torch.stack(nets.kappas(features, signs))).sum(0)
            factor = (most * losses.detach() / penalty.detach()).clamp(max=1)
            total = total + torch.where(now, every * factor * penalty, 0.0).sum()
            acted, penalties = acted + (now & (factor < 1)), penalties + now
        if tempering := any(m.projected or m.along < math.inf for m in methods) and bool(now.any()):
            task = torch.autograd.grad(losses.sum(), nets.parameters, retain_graph=True)
        gradients = torch.autograd.grad(total, nets.parameters)
        if tempering:
            gradients = tempered(task, gradients, each("along"), each("projected"))
        if bool((rho > 0).any()):
            gradients = uphill(nets, gradients, rho, inputs, targets)
        update(gradients, step, steps)
    held = [torch.stack([getattr(s, name) for s in sets])[place] for name in ("held_x", "held_y")]
    with torch.no_grad():
        out, fitted = nets.features(held[0])[-1], nets.features(x[place])[-1]
        accuracy = [(z.argmax(-1) == t).float().mean(1) for z, t in ((out, held[1]), (fitted, y[place]))]
        loss, finite = nets.task(out, held[1]), torch.isfinite(fitted).all(-1).all(-1)
    return [
        asdict(cell)
        | {"seed": seed, "method": method.name, "finite": bool(finite[i]), "accuracy": float(accuracy[0][i])}
        | {"training_accuracy": float(accuracy[1][i]), "held_loss": float(loss[i])}
        | {"bounded": float(acted[i] / penalties[i].clamp(min=1))}
        for i, (seed, method) in enumerate(runs)
    ]


def uphill(nets: Networks, gradients: Sequence[Tensor], rho: Tensor, x: Tensor, y: Tensor) -> list[Tensor]:
    """SAM's gradients where there is a rho (Foret et al. 2021)."""
    norm = torch.stack([g.square().sum((1, 2)) for g in gradients]).sum(0).sqrt() + 1e-12
    move = [(rho / norm)[:, None, None] * g for g in gradients]
    with torch.no_grad():
        torch._foreach_add_(nets.parameters, move)
    there = torch.autograd.grad(nets.task(nets.features(x)[-1], y).sum(), nets.parameters)
    with torch.no_grad():
        torch._foreach_sub_(nets.parameters, move)
    return [torch.where((rho > 0)[:, None, None], a, g) for a, g in zip(there, gradients, strict=True)]


def tempered(task: Sequence[Tensor], both: Sequence[Tensor], along: Tensor, projected: Tensor) -> list[Tensor]:
    """Gradients whose part of the penalty is projected (Yu et al. 2020) and bounded by the norm of the task's."""

    def inner(one: Sequence[Tensor], two: Sequence[Tensor]) -> Tensor:
        return torch.stack([(a * b).sum((1, 2)) for a, b in zip(one, two, strict=True)]).sum(0)[:, None, None]

    extra = [a - b for a, b in zip(both, task, strict=True)]
    against = projected[:, None, None] * (inner(extra, task) / inner(task, task).clamp(min=1e-20)).clamp(max=0)
    extra = [a - against * b for a, b in zip(extra, task, strict=True)]
    longest = along[:, None, None] * inner(task, task).sqrt()
    factor = (longest / inner(extra, extra).sqrt().clamp(min=1e-20)).clamp(max=1)
    return [b + factor * a for a, b in zip(extra, task, strict=True)]


class Optimizer:
    """SGD with momentum .9 and weight decay 5e-4, or AdamW; cosine schedule."""

    def __init__(self, cell: Cell, parameters: Sequence[Tensor]) -> None:
        self.adam, self.rate, self.parameters = cell.optimizer == "adamw", cell.rate * LR[cell.optimizer], parameters
        self.first, self.second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))

    @torch.no_grad()
    def __call__(self, gradients: Sequence[Tensor], step: int, steps: int) -> None:
        """One step."""
        rate = self.rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        for p, g, a, b in zip(self.parameters, gradients, self.first, self.second, strict=True):
            if not self.adam:
                p -= rate * a.mul_(0.9).add_(g + 5e-4 * p)
                continue
            a.mul_(0.9).add_(g, alpha=0.1)
            b.mul_(0.999).addcmul_(g, g, value=0.001)
            unbiased = (a / (1 - 0.9 ** (step + 1)), (b / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            p -= rate * (0.01 * p + unbiased[0] / unbiased[1])


def cells(what: str) -> Iterator[Cell]:
    """Those of a question."""
    rates, losses = (1.0,), ("cross-entropy",)
    if what == "tried":
        yield Cell("digits", 0.2, "sgd", 1.0, "cross-entropy")
        yield Cell("vehicle", 0.0, "sgd", 1.0, "cross-entropy")
        yield Cell("vowel", 0.0, "adamw", 1.0, "cross-entropy")
        return
    if what == "default":
        rates, losses = (1.0, 3.0, 1 / 3), ("cross-entropy", "squares")
    for loss, rate, task, noise, optimizer in itertools.product(losses, rates, BATCH, (0.0, 0.2), LR):
        yield Cell(task, noise, optimizer, rate, loss)


def show(path: Path) -> None:
    """Differences to plain by cell: mean ± standard error in points, and how often the bound acted."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    by: dict[tuple[Any, ...], dict[str, dict[int, Any]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        by[tuple(row[f] for f in Cell.__dataclass_fields__)][row["method"]][row["seed"]] = row
    names = [m for m in dict.fromkeys(row["method"] for row in rows) if m != "plain"]
    print("| task | plain |", " | ".join(names), "|\n|---|---|" + "---|" * len(names))
    for cell, found in by.items():
        plain, texts = found["plain"], []
        for name in names:
            own = found.get(name, {})
            gains = [100 * (own[s]["accuracy"] - plain[s]["accuracy"]) for s in own if s in plain]
            if not gains:
                texts.append("")
                continue
            error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
            lost = sum(not r["finite"] for r in own.values())
            share = statistics.mean(r["bounded"] for r in own.values())
            texts.append(
                f"{statistics.mean(gains):+.2f} ± {error:.2f} ({share:.2f}){f' {lost} lost' if lost else ''}"
            )
        mean = 100 * statistics.mean(r["accuracy"] for r in plain.values())
        print(
            f"| {' '.join(f'{c:.3g}' if isinstance(c, float) else c for c in cell)} | {mean:.1f} |",
            " | ".join(texts),
            "|",
        )


def main() -> None:
    """Run what is missing, or show what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("choose", "default", "tried", "show"))
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--tables", type=Path, default=Path("tables"))
    parser.add_argument("--out", type=Path, default=Path("screening.jsonl"))
    given = parser.parse_args()
    if given.what == "show":
        show(given.file or given.out)
        return
    torch.set_num_threads(1)
    test = given.what == "default"
    methods, seeds = {
        "choose": (CANDIDATES, range(100, 104)),
        "default": (DEFAULT, range(10, 20)),
        "tried": (TRIED, range(300, 305)),
    }[given.what]
    old = given.out.read_text().splitlines() if given.out.is_file() else []
    done = {tuple(json.loads(line)[f] for f in Cell.__dataclass_fields__) for line in old}
    for cell in cells(given.what):
        if tuple(asdict(cell).values()) not in done:
            rows = train(cell, list(itertools.product(seeds, methods)), given.tables, test=test)
            with given.out.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            print(cell, flush=True)


if __name__ == "__main__":
    main()
