"""Are standard errors honest? Estimates over many seeds against the exact value, on trained networks.

    python benchmarks/calibration.py [--seeds 100] [--only NAME] [--method NAME] [--json PATH]

For each network and stochastic method it prints the share of seeds in which the estimate is more than 2, and more
than 4, standard errors from the exact value (normal: 4.6 % and .006 %), and the root mean square of that distance (1
for errors that are neither too small nor too large). Every network is a small one, trained for seconds on data that
come with scikit-learn, on up to 96 samples, in float64. Of all networks and methods it writes the same as JSON,
method by method.
"""

import argparse
import math
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from sklearn import datasets
from torch import Tensor, nn

from output import RESULTS, environment, save
from relflat import relative_flatness

METHODS: dict[str, dict[str, Any]] = {
    "probe(hessian)": {"method": "probe", "curvature": "hessian"},
    "probe(ggn)": {"method": "probe", "curvature": "ggn"},
    "probe(hessian in weight)": {"method": "probe", "curvature": "hessian", "in_weight": True},
    "probe(ggn in weight)": {"method": "probe", "curvature": "ggn", "in_weight": True},
    "finite_difference": {"method": "finite_difference", "curvature": "hessian"},
    "xtrace": {"method": "xtrace", "curvature": "hessian"},
}
Network = tuple[str, nn.Module, nn.Module, tuple[Tensor, Tensor], str]


def _mlp(sizes: list[int], activation: type[nn.Module], norm: bool = False) -> nn.Sequential:
    parts: list[nn.Module] = []
    for a, b in pairwise(sizes[:-1]):
        parts += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), activation()]
    return nn.Sequential(*parts, nn.Linear(*sizes[-2:]))


def _cnn(activation: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), activation(), nn.Conv2d(4, 6, 3, stride=2), activation(), nn.Flatten()),
        *(nn.Linear(24, 12), activation(), nn.Linear(12, 10)),
    )


def _trained(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, steps: int, rate: float) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return model.eval()


def _data(name: str) -> tuple[Tensor, Tensor]:
    x, y = (torch.as_tensor(a) for a in getattr(datasets, f"load_{name}")(return_X_y=True))
    x = x.double()
    return (x - x.mean(0)) / x.std(0).clamp_min(1e-6), y.double()[:, None] / 100 if name == "diabetes" else y


def networks() -> Iterator[tuple[str, Callable[[], Network]]]:
    """Twelve networks and more: name, and what trains it."""
    table = [
        ("digits, relu", "digits", [64, 24, 24, 10], nn.ReLU, "2", 300),
        ("digits, tanh", "digits", [64, 24, 24, 10], nn.Tanh, "2", 150),
        ("digits, first layer", "digits", [64, 16, 10], nn.ReLU, "0", 200),
        ("digits, deep", "digits", [64, 16, 16, 16, 10], nn.GELU, "2", 300),
        ("digits, batchnorm", "digits", [64, 16, 16, 10], nn.ReLU, "3", 100),
        ("digits, early", "digits", [64, 24, 24, 10], nn.ReLU, "2", 20),
        ("wine, tanh", "wine", [13, 12, 12, 3], nn.Tanh, "2", 100),
        ("wine, relu", "wine", [13, 16, 3], nn.ReLU, "0", 200),
        ("cancer, relu", "breast_cancer", [30, 16, 16, 2], nn.ReLU, "2", 200),
        ("cancer, silu", "breast_cancer", [30, 12, 2], nn.SiLU, "0", 100),
        ("iris, tanh", "iris", [4, 10, 10, 3], nn.Tanh, "2", 200),
        ("diabetes, tanh", "diabetes", [10, 12, 12, 1], nn.Tanh, "2", 150),
    ]
    for name, source, sizes, activation, layer, steps in table:
        yield name, lambda a=(name, source, sizes, activation, layer, steps): _dense(*a)
    yield "digits, cnn relu", lambda: _convolutional("digits, cnn relu", nn.ReLU)
    yield "digits, cnn tanh", lambda: _convolutional("digits, cnn tanh", nn.Tanh)


def _dense(name: str, source: str, sizes: list[int], activation: type[nn.Module], layer: str, steps: int) -> Network:
    torch.manual_seed(0)
    x, y = _data(source)
    loss = nn.MSELoss() if source == "diabetes" else nn.CrossEntropyLoss()
    model = _trained(_mlp(sizes, activation, "batchnorm" in name).double(), loss, x, y, steps, 0.01)
    chosen = torch.randperm(len(x))[:96]
    return name, model, loss, (x[chosen], y[chosen]), layer


def _convolutional(name: str, activation: type[nn.Module]) -> Network:
    torch.manual_seed(0)
    x, y = _data("digits")
    x = x.reshape(-1, 1, 8, 8)
    model = _trained(_cnn(activation).double(), nn.CrossEntropyLoss(), x[:600], y[:600], 80, 0.01)
    chosen = torch.randperm(600)[:48]
    return name, model, nn.CrossEntropyLoss(), (x[chosen], y[chosen]), "2"


def distances(network: Network, options: dict[str, Any], seeds: int, probes: int | None = None) -> Tensor:
    """How many standard errors the estimate of each seed is from the exact value."""
    _, model, loss, data, layer = network
    options = dict(options)
    target: Any = model.get_submodule(layer).weight if options.pop("in_weight", False) else layer
    true = relative_flatness(model, loss, data, layer=layer, curvature=options["curvature"], method="exact").value
    found = [
        relative_flatness(model, loss, data, layer=target, seed=s, probes=probes, **options) for s in range(seeds)
    ]
    return torch.tensor([(f.value - true) / f.stderr if f.stderr else 0.0 for f in found], dtype=torch.float64)


def row(network: str, method: str, z: Tensor) -> dict[str, Any]:
    """Shares beyond 2 and 4 standard errors, and the root mean square; printed and returned."""
    beyond2, beyond4 = (float((z.abs() > k).double().mean()) for k in (2, 4))
    rms = math.sqrt(float(z.square().mean()))
    print(f"{network:24s}{method:28s}{beyond2:8.1%}{beyond4:8.2%}{rms:8.2f}", flush=True)
    return {"case": network, "row": method, "beyond_2": beyond2, "beyond_4": beyond4, "rms": rms, "n": len(z)}


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--probes", type=int, help="default: that of relative_flatness")
    parser.add_argument("--only", default="", help="networks whose name holds this")
    parser.add_argument("--method", default="", help="methods whose name holds this")
    parser.add_argument("--json", type=Path, help="by default benchmarks/results/calibration.json, if all is run")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="kappa of layer")
    path = options.json or (None if options.only or options.method else RESULTS / "calibration.json")
    trained = [make() for name, make in networks() if options.only in name]
    content: dict[str, Any] = {"environment": environment(), "seeds": options.seeds, "rows": []}
    print(f"{'network':24s}{'method':28s}{'>2':>8s}{'>4':>8s}{'rms':>8s}")
    for method in [m for m in METHODS if options.method in m]:
        found = [distances(network, METHODS[method], options.seeds, options.probes) for network in trained]
        content["rows"] += [row(n[0], method, z) for n, z in zip(trained, found, strict=True)]
        content["rows"].append(row("all", method, torch.cat(found)))
        if path is not None:
            save(path, content)


if __name__ == "__main__":
    main()
