"""What ``same_values.py`` reads of each network: values, and norms and projections of gradients, by public calls."""

import functools
import importlib
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import relflat
from compared_networks import CE, CLASSES, IN, LABELS, N, Network, mlp
from compared_sequences import all_networks
from relflat import FAM, relative_flatness_by_layer, reparam

Record = dict[str, Any]
Reading = tuple[str, Callable[[], Record]]

MEASURED: dict[str, dict[str, Any]] = {
    "exact": {"method": "exact"},
    "exact ggn": {"method": "exact", "curvature": "ggn"},
    "exact adaptive": {"method": "exact", "adaptive": True},
    "exact normalised": {"method": "exact", "normalize_features": True},
    "exact ggn adaptive": {"method": "exact", "curvature": "ggn", "adaptive": True},
    "exact ggn normalised": {"method": "exact", "curvature": "ggn", "normalize_features": True},
    "closed form": {"method": "closed_form"},
    "closed form adaptive": {"method": "closed_form", "adaptive": True},
    "auto": {},
    "auto ggn": {"curvature": "ggn"},
    "probe": {"method": "probe", "probes": 3},
    "probe ggn": {"method": "probe", "probes": 3, "curvature": "ggn"},
    "rtol": {"method": "probe", "rtol": 0.5, "curvature": "ggn"},
    "finite difference": {"method": "finite_difference", "probes": 2},
    "xtrace": {"method": "xtrace", "probes": 8},
    "xtrace of all": {"method": "xtrace", "probes": 200, "curvature": "ggn"},
}
TRAINED: dict[str, dict[str, Any]] = {
    "exact": {"method": "exact"},
    "exact frozen": {"method": "exact", "gradient": "frozen"},
    "exact weights": {"method": "exact", "gradient": "weights"},
    "exact adaptive": {"method": "exact", "adaptive": True},
    "exact normalised": {"method": "exact", "normalize_features": True},
    "exact hessian": {"method": "exact", "curvature": "hessian"},
    "exact hessian frozen": {"method": "exact", "curvature": "hessian", "gradient": "frozen"},
    "exact hessian adaptive": {"method": "exact", "curvature": "hessian", "adaptive": True},
    "closed form": {"method": "closed_form"},
    "closed form frozen": {"method": "closed_form", "gradient": "frozen"},
    "closed form adaptive": {"method": "closed_form", "adaptive": True, "normalize_features": True},
    "auto": {},
    "auto weights": {"gradient": "weights"},
    "auto hessian": {"curvature": "hessian"},
    "probe": {"method": "probe", "probes": 2},
    "probe normalised": {"method": "probe", "probes": 2, "normalize_features": True, "curvature": "hessian"},
    "finite difference": {"method": "finite_difference", "curvature": "hessian"},
    "radius": {"radius": 0.1},
    "radius adaptive": {"radius": 0.1, "adaptive": True, "strength": 0.5},
}
ALL_LAYERS: dict[str, dict[str, Any]] = {
    "auto": {},
    "exact": {"method": "exact"},
    "exact weights": {"method": "exact", "gradient": "weights"},
    "one a step": {"method": "exact", "layers_per_step": 1},
    "every second": {"method": "exact", "every": 2},
    "warming up": {"method": "exact", "warmup_steps": 4},
    "radius": {"radius": 0.05, "strength": 0.3},
}


# -- what is read of one call ------------------------------------------------------------------------------


@functools.cache
def _direction(size: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(size).standard_normal(size)) / math.sqrt(size)


def sketch(gradients: Mapping[str, Tensor | None]) -> dict[str, list[float]]:
    """Norm and one random projection of each gradient."""
    found = {k: torch.zeros(1) if g is None else g.detach().to_dense().flatten() for k, g in gradients.items()}
    return {k: [float(g.norm()), float(g @ _direction(g.numel()))] for k, g in found.items()}


def is_exact(method: str) -> bool:
    """Whether the named method uses no random numbers."""
    names = re.sub(r"\([^)]*\)", "", method).split(", ")
    return all(name in ("closed_form", "exact") for name in names)


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Those values that are numbers."""
    return {k: float(v) for k, v in values.items() if isinstance(v, (int, float))}


def measured(network: Network, layer: Any, **options: Any) -> Record:
    """Flatness of layers over the data in two batches."""
    torch.manual_seed(2)
    model, x, y = network.build(), network.x(), network.y()
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    found = relative_flatness_by_layer(model, network.loss, batches, layer=layer, **options)
    methods = ", ".join(f.method for f in found.values())
    values = {f"{name} {k}": v for name, f in found.items() for k, v in numbers(asdict(f)).items()}
    return {"method": methods, "values": values}


def criterion_of(network: Network, model: nn.Module, layer: Any, **options: Any) -> FAM:
    """FAM on a layer; options of a schedule become a function of the step where the version has none."""
    strength, accepted = options.pop("strength", 1.0), inspect.signature(FAM).parameters
    if (every := options.get("every")) and "every" not in accepted:
        del options["every"]
        strength = lambda step: 0.0 if step % every else 1.0  # noqa: E731
    if (warmup := options.get("warmup_steps")) and "warmup_steps" not in accepted:
        del options["warmup_steps"]
        strength = lambda step: min(1.0, (step + 1) / (warmup + 1))  # noqa: E731
    return FAM(network.loss, model, layer, strength=strength, seed=3, **options)


def trained(network: Network, layer: Any, steps: int = 1, alone: bool = False, **options: Any) -> Record:
    """What FAM reports of some steps, and the gradients they add up to; alone: of the penalty of a given loss."""
    torch.manual_seed(2)
    model, x, y = network.build(), network.x(), network.y()
    values: dict[str, float] = {}
    methods = []
    with criterion_of(network, model, layer, **options) as criterion:
        for step in range(steps):
            torch.manual_seed(7)
            outputs = model(x)
            total = criterion.penalty(network.loss(outputs, y)) if alone else criterion(outputs, y)
            if total.requires_grad:
                total.sum().backward()
            last = criterion.last
            values |= {f"{step} {k}": v for k, v in numbers({**last, **last.get("by_layer", {})}).items()}
            values[f"{step} sum"] = float(total.detach().sum())
            methods += [last["method"]] if "method" in last else []
    gradients = sketch({name: p.grad for name, p in model.named_parameters()})
    return {"method": ", ".join(methods) or "exact", "values": values, "gradients": gradients}


# -- the readings ------------------------------------------------------------------------------------------


def of_layers(network: Network) -> Iterator[Reading]:
    """Every way of measuring and training, of each layer by itself."""
    for layer in network.layers:
        for way, options in MEASURED.items():
            yield f"{layer}: measure {way}", functools.partial(measured, network, layer, **options)
        for way, options in TRAINED.items():
            yield f"{layer}: FAM {way}", functools.partial(trained, network, layer, **options)
            if way.startswith(("exact hessian", "auto", "closed form")):
                run = functools.partial(trained, network, layer, alone=True, **options)
                yield f"{layer}: penalty {way}", run
        yield f"{layer}: per sample", functools.partial(per_sample, network, layer)


def of_many_layers(network: Network) -> Iterator[Reading]:
    """All layers at once, for some steps, and measured in one go."""
    if any("." in layer and "weight" in layer for layer in network.layers):
        return
    for way, options in ALL_LAYERS.items():
        yield f"*: FAM {way}", functools.partial(trained, network, "*", steps=3, **options)
    for way in ("exact", "auto", "probe ggn"):
        yield f"*: measure {way}", functools.partial(measured, network, "*", **MEASURED[way])


def per_sample(network: Network, layer: str) -> Record:
    """Kappa of each sample, by exact methods."""
    torch.manual_seed(2)
    model, data = network.build(), (network.x(), network.y())
    found = relflat.per_sample_flatness(model, network.loss, data, layer=layer, method="exact")
    return {"method": "exact", "values": {str(i): float(v) for i, v in enumerate(found)}}


def of_relatives(network: Network) -> Iterator[Reading]:
    """Robustness of features, by sampling, and largest eigenvalues, from a random start."""
    relatives: dict[str, Callable[..., Any]] = {
        "feature robustness": functools.partial(relflat.feature_robustness, radius=0.1, draws=3),
        "max eigenvalue": relflat.max_eigenvalue_flatness,
    }

    def estimate(function: Callable[..., Any]) -> Record:
        torch.manual_seed(2)
        model, data = network.build(), (network.x(), network.y())
        found = function(model, network.loss, data, layer=network.layers[0])
        return {"method": found.method, "values": numbers(asdict(found))}

    for name, function in relatives.items():
        yield name, functools.partial(estimate, function)


def of_random_networks(count: int) -> Iterator[Reading]:
    """Networks of the tests' recipes, drawn from all their losses, activations and shapes."""
    sys.path.insert(0, str(Path(relflat.__file__).parents[2] / "tests"))
    nets, rng = importlib.import_module("nets"), np.random.default_rng(0)
    kinds = (*nets.KNOWN_LOSSES, *nets.UNKNOWN_LOSSES)

    def draw(i: int) -> Network:
        loss = nets.Loss(
            kinds[i % len(kinds)],
            ("mean", "sum")[rng.integers(2)],
            *(bool(rng.integers(2)) for _ in range(2)),
            (None, -100, 0)[rng.integers(3)],
            (0.0, 0.2)[rng.integers(2)],
        )
        widths, positions = tuple(int(w) for w in rng.integers(2, 6, 2 + i % 3)), int(rng.integers(3))
        flags, activation = [bool(b) for b in rng.integers(2, size=2)], list(nets.ACTIVATIONS)[i % 4]
        last = int(rng.integers(len(widths) - 1))
        net = nets.Net(i, widths, activation, loss, 6, positions, flags[0], last, flags[1])
        problem = net.build()
        return Network(
            f"random {i}",
            lambda: net.build().model,
            (problem.layer,),
            x=lambda: problem.inputs,
            y=lambda: problem.targets,
            loss=problem.loss_fn,
        )

    for i in range(count):
        network = draw(i)
        for name, run in of_layers(network):
            if "measure" not in name or len(network.y()) == len(network.x()):
                yield f"{network.name}: {name}", run


def of_reparametrisations() -> Iterator[Reading]:
    """Weights after each change of the weights, and kappa there."""

    def after(change: Callable[[nn.Sequential, Tensor], Any]) -> Record:
        torch.manual_seed(4)
        model = mlp(IN, 5, 4, CLASSES, between=nn.ReLU)
        x, y = torch.randn(N, IN), torch.tensor(LABELS)
        change(model, x)
        flat = relative_flatness_by_layer(model, CE, (x, y), layer="*", method="exact")
        weights = sketch(dict(model.named_parameters()))
        return {"method": "exact", "values": {k: f.value for k, f in flat.items()}, "gradients": weights}

    def replace(make: Callable[[nn.Linear, Tensor], nn.Module]) -> Callable[[nn.Sequential, Tensor], None]:
        def change(model: nn.Sequential, x: Tensor) -> None:
            model[2] = make(model[2], model[:2](x))

        return change

    turn = torch.linalg.qr(torch.arange(25.0).reshape(5, 5).cos()).Q
    changes: dict[str, Callable[[nn.Sequential, Tensor], Any]] = {
        "rescale_layer": lambda m, x: reparam.rescale_layer(m[0], m[1], m[2], 3.0),
        "rescale_neurons": lambda m, x: reparam.rescale_neurons(m[0], m[1], m[2], torch.arange(1.0, 6.0)),
        "random_rescaling": lambda m, x: reparam.random_rescaling(m, generator=torch.Generator().manual_seed(5)),
        "shift_rows": lambda m, x: reparam.shift_rows(m[4], torch.arange(4.0), CE),
        "rescale_features": replace(lambda layer, phi: reparam.rescale_features(layer, torch.arange(1.0, 6.0))),
        "normalize_features": replace(reparam.normalize_features),
        "rotate_features": replace(lambda layer, phi: reparam.rotate_features(layer, turn)),
    }
    for name, change in changes.items():
        yield f"reparam: {name}", functools.partial(after, change)


def of_vocabulary() -> Iterator[Reading]:
    """Linear layer and cross-entropy in one, in chunks."""

    def run(**options: Any) -> Record:
        torch.manual_seed(6)
        phi, W, bias = (torch.randn(*s, requires_grad=True) for s in ((4, 3, 5), (11, 5), (11,)))
        y = torch.randint(11, (4, 3))
        y[0, 1] = y[2, 2] = -100
        use_bias = options.pop("biased", True)
        found = relflat.linear_cross_entropy_fam(phi, W, y, strength=0.3, bias=bias if use_bias else None, **options)
        found.total.backward()
        gradients = sketch({"phi": phi.grad, "weight": W.grad, "bias": bias.grad})
        method = "probe" if options.get("probes") else "exact"
        return {
            "method": method,
            "values": numbers({k: float(v) for k, v in found._asdict().items()}),
            "gradients": gradients,
        }

    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "without bias, sum": {"biased": False, "reduction": "sum"},
        "smoothing, chunks": {"label_smoothing": 0.2, "chunk_tokens": 4, "chunk_classes": 3},
        "frozen": {"gradient": "frozen", "chunk_tokens": 5},
        "weights, smoothing": {"gradient": "weights", "label_smoothing": 0.1, "chunk_classes": 4},
        "probes": {"probes": 3, "step": 1},
        "probes, frozen, sum": {"probes": 2, "step": 0, "gradient": "frozen", "reduction": "sum"},
    }
    for way, options in ways.items():
        yield f"vocabulary: {way}", functools.partial(run, **options)


def all_readings() -> Iterator[Reading]:
    """Every reading by its unique name."""
    for network in all_networks():
        for make in (of_layers, of_many_layers, of_relatives):
            yield from ((f"{network.name}: {name}", run) for name, run in make(network))
    yield from of_random_networks(30)
    yield from of_reparametrisations()
    yield from of_vocabulary()


def read(run: Callable[[], Record]) -> Record:
    """One reading, or the error in its place."""
    try:
        record = run()
    except Exception as error:  # a version that fails where the other does not is what is looked for
        return {"error": type(error).__name__, "message": str(error), "exact": True}
    return {**record, "exact": is_exact(record["method"])}
