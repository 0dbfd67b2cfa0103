"""Errors of estimators of kappa and of Tr H on trained networks, by products and by time.

A ReLU CNN, an MLP and a transformer are trained on the digits of scikit-learn (real 8 x 8 pictures; the rows of a
picture are the transformer's tokens) and measured on 256 of their training pictures. Every estimator is given 6, 12
or 24 products, and as many as take the time of our default at 12, and is repeated with fresh seeds; reported is the
root mean square error relative to the exact value (from the dense sum over a basis; for the convolution from a long
run, with its standard error). Kappa is that of the Gauss-Newton matrix, Tr H of the Hessian of the layer.

    python benchmarks/estimators.py [--repeats 50] [--json benchmarks/results/estimators.json]

Where curvlinops and PyHessian are installed (see ``curvlinops_traces.py``), they run as well; the committed numbers
are with both. A picture is drawn beside the JSON; the committed one is docs/assets/estimators.svg.
"""

import argparse
import functools
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from output import environment, save
from relflat import Flatness, relative_flatness
from relflat.capture.tap import Tap
from relflat.capture.uses import Matrix
from relflat.curvature.operators import GGNOperator, slope_in
from relflat.estimate.estimator import Estimator
from relflat.estimate.scene import Scene
from relflat.loss.known import known_loss
from relflat.measure.xtrace import Coordinates, Sketch
from relflat.options import Options
from relflat.plot.style import COLOURS, MARKERS, STYLE
from relflat.rng import Rng

CE = nn.CrossEntropyLoss()
GROUPS = {
    "Hutch++": 3,
    "XTrace": 2,
    "Hutch++ of curvlinops": 3,
    "XTrace of curvlinops": 2,
}  # products come so many at once
Estimate = Callable[[int, int], float]  # of products and seed


class Tokens(nn.Module):
    """A transformer whose tokens are the rows of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Linear(8, 32), nn.Parameter(torch.zeros(8, 32))
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.output = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of pictures (n, 1, 8, 8)."""
        return self.output(self.encoder(self.embedding(x[:, 0]) + self.position).mean(1))


def cnn() -> nn.Module:
    """Two convolutions and a hidden layer."""
    body = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()
    return nn.Sequential(
        *body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def mlp() -> nn.Module:
    """Two hidden layers."""
    wide = nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()
    return nn.Sequential(nn.Flatten(), *wide, nn.Linear(64, 10))


LAYERS = {  # network, layer, and whether the exact value is to be had
    "conv": (cnn, "2", False),
    "linear": (cnn, "6", True),
    "mlp": (mlp, "3", True),
    "transformer": (Tokens, "encoder.linear1", True),
}
TITLES = {"conv": "CNN, convolution", "linear": "CNN, linear", "mlp": "MLP", "transformer": "transformer"}


@functools.cache
def trained(make: Callable[[], nn.Module], epochs: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network fitted to digits, and the pictures it is measured on."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(1280).split(64):
            optimizer.zero_grad()
            CE(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval(), x[:256], y[:256]


class Problem:
    """One layer of the net: every estimator is a function of (products, seed)."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, layer: str) -> None:
        tap = Tap(model, layer, measuring=True)
        outputs = model(x)
        (record,) = tap.take()
        self.known = known_loss(CE, outputs, (y,), {})
        self.loss = CE(outputs, y)
        self.scene = Scene(self.loss, record.calls, outputs)
        self.matrix = Matrix.of(layer, tap.layers[layer])
        self.weight = self.matrix.weight().detach()
        slopes = slope_in([outputs], self.loss)
        self.operator = GGNOperator([outputs], slopes, [self.matrix.as_call()], create_graph=False)
        self.model, self.data, self.layer = model, (x, y), layer
        tap.close()

    def ours(self, products: int, seed: int) -> float:
        """The default: signs in the space of the logits (I7)."""
        return self._by_engine(replace(self.scene, known=self.known), products, seed)

    def per_sample(self, products: int, seed: int) -> float:
        """Hutchinson with a direction of its own for each sample (I6)."""
        return self._by_engine(self.scene, products, seed)

    def _by_engine(self, scene: Scene, products: int, seed: int) -> float:
        (part,) = Estimator(Options("ggn", "probe", products, measuring=True), seed)(scene, 0).values()
        return float(part.kappa.detach().mean(0).sum())

    def _applied(self, r: Tensor) -> Tensor:
        """The operator whose trace is kappa, on R of shape (m, m): ``R -> W' H[W R]``."""
        pulled = self.operator([self.matrix.back(self.weight @ r)])[0]
        return self.weight.mT @ self.matrix.view(pulled)

    def hutchinson(self, products: int, seed: int) -> float:
        """One direction for the whole batch."""
        m, rng = self.weight.shape[1], Rng(seed, 0)
        draws = [rng.signs((m, m), self.weight) for _ in range(products)]
        return sum(float((r * self._applied(r)).sum().detach()) for r in draws) / products

    def hutch_plus_plus(self, products: int, seed: int) -> float:
        """Meyer et al. 2021: a third of the products each for a sketch, its exact trace, and the rest."""
        m, rng, k = self.weight.shape[1], Rng(seed, 0), products // 3
        sketch = torch.stack([self._applied(rng.signs((m, m), self.weight)).flatten() for _ in range(k)], 1)
        q, _ = torch.linalg.qr(sketch)

        def apply(v: Tensor) -> Tensor:
            return self._applied(v.reshape(m, m)).flatten()

        value = sum(float(q[:, i] @ apply(q[:, i])) for i in range(k))
        for _ in range(k):
            v = rng.signs((m, m), self.weight).flatten()
            v = v - q @ (q.mT @ v)
            value += float(v @ apply(v)) / k
        return value

    def x_trace(self, products: int, seed: int) -> float:
        """Epperly et al. 2024, as ``relative_flatness(..., method="xtrace")`` has it."""
        estimator = Estimator(Options("ggn", "xtrace", products, measuring=True), seed)
        (subject,) = estimator.subjects(self.scene, together=True)
        product = partial(subject.space.weight_product, subject.operator)
        sketch = Sketch(Coordinates(subject.space.weight.detach(), adaptive=False), seed, products)
        while sketch.pending is not None:
            of = sketch.coordinates
            sketch.receive(torch.stack([of.seen(product(of.change(x))) for x in sketch.pending.mT], 1))
        return sketch.value


def of_kappa(problem: Problem) -> dict[str, Estimate]:
    """The estimators of kappa: ours, and those of curvlinops where it is installed."""
    found = {
        "logit-space signs (default)": problem.ours,
        "Hutchinson, a probe a sample": problem.per_sample,
        "Hutchinson, a probe a batch": problem.hutchinson,
        "Hutch++": problem.hutch_plus_plus,
        "XTrace": problem.x_trace,
    }
    if find_spec("curvlinops") is not None:
        from curvlinops_traces import KappaOperator

        operator = KappaOperator(problem.model, CE, problem.layer, problem.data)
        found |= {"Hutch++ of curvlinops": operator.hutch_plus_plus, "XTrace of curvlinops": operator.xtrace}
    return found


def of_trace(problem: Problem) -> dict[str, Estimate]:
    """Those of Tr H: ours, which comes with kappa, and PyHessian's where it is installed."""

    def ours(products: int, seed: int) -> float:
        return measured(problem, curvature="hessian", probes=products, method="probe", seed=seed).trace

    found: dict[str, Estimate] = {"probes (default), with kappa": ours}
    if find_spec("pyhessian") is not None:
        from pyhessian import hessian

        def theirs(products: int, seed: int) -> float:
            torch.manual_seed(seed)
            for name, parameter in problem.model.named_parameters():
                parameter.requires_grad_(name == f"{problem.layer}.weight")
            try:
                with warnings.catch_warnings(action="ignore"):  # it makes the graph by backward(create_graph=True)
                    whole = hessian(problem.model, CE, data=problem.data, cuda=False)
                draws = whole.trace(maxIter=products, tol=0.0)
            finally:
                problem.model.requires_grad_(True).zero_grad()
            return float(sum(draws) / len(draws))

        found["PyHessian, the layer alone trainable"] = theirs
    return found


def measured(problem: Problem, **options: object) -> Flatness:
    """As a user measures."""
    return relative_flatness(problem.model, CE, problem.data, layer=problem.layer, **options)


def assess(estimate: Callable[[int, int], float], true: float, products: int, repeats: int) -> dict[str, float]:
    """Relative RMSE and seconds of an estimator at a number of products."""
    estimate(products, 10**5)
    began = time.perf_counter()
    errors = [estimate(products, seed) / true - 1 for seed in range(repeats)]
    seconds = (time.perf_counter() - began) / repeats
    squares = torch.tensor(errors, dtype=torch.float64).square()
    return {"rmse": float(squares.mean().sqrt()), "seconds": seconds}


def compared(
    what: str, true: float, stderr: float, estimators: dict[str, Estimate], repeats: int, common: dict[str, Any]
) -> list[dict[str, Any]]:
    """All estimators of one number at several budgets; the first one's time at 12 products is the last budget."""
    print(f"{what} = {true:.5g} ± {stderr:.2g}", flush=True)
    print(f"{'estimator':36s}" + "".join(f"{f'{k} products':>22s}" for k in (6, 12, 24)) + "   at equal time")
    rows = []
    ours = 0.0
    for label, estimate in estimators.items():
        cells: dict[str, Any] = {str(k): assess(estimate, true, k, repeats) for k in (6, 12, 24)}
        ours = ours or cells["12"]["seconds"]
        affordable, unit = max(1, int(12 * ours / cells["12"]["seconds"])), GROUPS.get(label, 1)
        budget = max(affordable - affordable % unit, 2 * unit if unit == 2 else unit)
        equal = assess(estimate, true, budget, repeats)
        line = "".join(f"{c['rmse']:>12.4f} {c['seconds'] * 1e3:7.0f}ms" for c in cells.values())
        end = f"{equal['rmse']:.4f} ({budget} products, {equal['seconds'] * 1e3:.0f}ms)"
        print(f"{label:36s}{line}   {end}", flush=True)
        cells["equal_time"] = {"products": budget, **equal}
        rows.append({**common, "what": what, "value": true, "stderr": stderr, "row": label, "cells": cells})
    return rows


def draw(report: dict[str, Any], path: Path) -> None:
    """Error of kappa against products, a panel a layer."""
    import matplotlib.pyplot as plt  # only where a picture is drawn

    products, looks = (6, 12, 24), ("logit", "a sample", "a batch", "Hutch++", "XTrace")
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(LAYERS), figsize=(8.6, 3.1), sharey=True, layout="constrained")
        for panel, name in zip(panels, LAYERS, strict=True):
            for row in report["rows"]:
                label = row["row"]
                if (row["case"], row["what"]) != (name, "kappa"):
                    continue
                place = next(k for k, part in enumerate(looks) if part in label)
                errors = [100 * row["cells"][str(k)]["rmse"] for k in products]
                line = "--" if "curvlinops" in label else "-"
                look = {"color": COLOURS[place], "marker": MARKERS[place], "linestyle": line, "markersize": 4}
                panel.plot(products, errors, label=label, **look)
            panel.set(xscale="log", yscale="log", title=TITLES[name], xticks=products, xticklabels=products)
            panel.set(xlabel="products")
            panel.minorticks_off()
        panels[0].set(ylabel="root mean square error, %", yticks=(1, 3, 10, 30), yticklabels=("1", "3", "10", "30"))
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


@sdpa_kernel(SDPBackend.MATH)  # the others have no second derivative
def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.backends.mha.set_fastpath_enabled(False)  # it has no forward derivative, which curvlinops takes
    rows: list[dict[str, Any]] = []
    report = {"environment": environment(), "rows": rows}
    for name, (make, layer, exactly) in LAYERS.items():
        model, x, y = trained(make, options.epochs)
        problem, method = (
            Problem(model, x, y, layer),
            {"method": "exact"} if exactly else {"probes": 2000, "seed": 10**6},
        )
        ggn, hessian = (measured(problem, curvature=c, **method) for c in ("ggn", "hessian"))
        accuracy = float((model(x).argmax(1) == y).float().mean())
        print(f"\n{name}: accuracy {accuracy:.3f} on the pictures measured")
        common = {"case": name, "accuracy": accuracy, "samples": len(y)}
        rows += compared("kappa", ggn.value, ggn.stderr, of_kappa(problem), options.repeats, common)
        rows += compared("Tr H", hessian.trace, hessian.trace_stderr, of_trace(problem), options.repeats, common)
        if options.json:
            save(options.json, report)
    if options.json:
        draw(report, options.json.with_suffix(".svg"))


if __name__ == "__main__":
    main()
