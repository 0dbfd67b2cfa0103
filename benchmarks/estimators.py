"""Error of trace estimators for kappa of the Gauss-Newton matrix on a trained ReLU CNN, by products and by time.

The net is trained on the digits of scikit-learn (real 8 x 8 pictures) and measured on 256 of its training
pictures. Every estimator is given 6, 12 or 24 products and repeated with fresh seeds; reported is the root
mean square error relative to the exact value (from the dense sum over a basis for the linear layer, from a
long run of the logit-space estimator, with its standard error, for the convolution).

    python benchmarks/estimators.py [--repeats 50] [--json benchmarks/results/estimators.json]

Where curvlinops is installed (see ``curvlinops_traces.py``), its Hutch++ and XTrace run as well.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from output import environment, save
from relflat import relative_flatness
from relflat.capture.tap import Tap
from relflat.capture.uses import Matrix
from relflat.curvature.operators import GGNOperator, slope_in
from relflat.estimate.estimator import Estimator
from relflat.estimate.scene import Scene
from relflat.loss.known import known_loss
from relflat.measure.xtrace import Coordinates, Sketch
from relflat.options import Options
from relflat.rng import Rng

CE = nn.CrossEntropyLoss()
GROUPS = {
    "Hutch++": 3,
    "XTrace": 2,
    "Hutch++ of curvlinops": 3,
    "XTrace of curvlinops": 2,
}  # products come so many at once
LAYERS = {"conv": "2", "linear": "6"}


def trained_cnn(epochs: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A small ReLU CNN fitted to digits, and the pictures it is measured on."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )
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


def rivals(problem: Problem) -> dict[str, Callable[[int, int], float]]:
    """The estimators of curvlinops, where it is installed."""
    if find_spec("curvlinops") is None:
        return {}
    from curvlinops_traces import KappaOperator

    operator = KappaOperator(problem.model, CE, problem.layer, problem.data)
    return {"Hutch++ of curvlinops": operator.hutch_plus_plus, "XTrace of curvlinops": operator.xtrace}


def truth(problem: Problem, layer: str) -> tuple[float, float]:
    """Exact kappa, or a long run's with its standard error."""
    method, probes = ("exact", None) if layer == "linear" else ("probe", 2000)
    flat = relative_flatness(
        problem.model,
        CE,
        problem.data,
        layer=problem.layer,
        curvature="ggn",
        method=method,
        probes=probes,
        seed=10**6,
    )
    return flat.value, flat.stderr


def assess(estimate: Callable[[int, int], float], true: float, products: int, repeats: int) -> dict[str, float]:
    """Relative RMSE and seconds of an estimator at a number of products."""
    estimate(products, 10**5)
    began = time.perf_counter()
    errors = [estimate(products, seed) / true - 1 for seed in range(repeats)]
    seconds = (time.perf_counter() - began) / repeats
    squares = torch.tensor(errors, dtype=torch.float64).square()
    return {"rmse": float(squares.mean().sqrt()), "seconds": seconds}


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    model, x, y = trained_cnn(options.epochs)
    accuracy = float((model(x).argmax(1) == y).float().mean())
    report: dict[str, object] = {"environment": environment(), "accuracy": accuracy, "samples": len(y)}
    print(f"accuracy on the pictures measured: {accuracy:.3f}")
    for name, layer in LAYERS.items():
        problem = Problem(model, x, y, layer)
        true, stderr = truth(problem, name)
        print(f"\n{name} layer: kappa = {true:.5g} ± {stderr:.2g}")
        print(f"{'estimator':36s}" + "".join(f"{f'{k} products':>22s}" for k in (6, 12, 24)) + "   at equal time")
        estimators = {
            "logit-space signs (default)": problem.ours,
            "Hutchinson, a probe a sample": problem.per_sample,
            "Hutchinson, a probe a batch": problem.hutchinson,
            "Hutch++": problem.hutch_plus_plus,
            "XTrace": problem.x_trace,
            **rivals(problem),
        }
        table: dict[str, object] = {}
        ours = 0.0
        for label, estimate in estimators.items():
            cells = {k: assess(estimate, true, k, options.repeats) for k in (6, 12, 24)}
            ours = ours or cells[12]["seconds"]
            # error falls as products^-1/2 or faster; a budget of the default's time at 12 products
            affordable = max(1, int(12 * ours / cells[12]["seconds"]))
            unit = GROUPS.get(label, 1)
            budget = max(affordable - affordable % unit, 2 * unit if unit == 2 else unit)
            equal = assess(estimate, true, budget, options.repeats)
            table[label] = {**{str(k): v for k, v in cells.items()}, "equal_time": {"products": budget, **equal}}
            row = "".join(f"{c['rmse']:>12.4f} {c['seconds'] * 1e3:7.0f}ms" for c in cells.values())
            print(f"{label:36s}{row}   {equal['rmse']:.4f} ({budget} products, {equal['seconds'] * 1e3:.0f}ms)")
        report[name] = {"kappa": true, "stderr": stderr, "estimators": table}
    if options.json:
        save(options.json, report)


if __name__ == "__main__":
    main()
