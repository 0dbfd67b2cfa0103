"""The ways to compute kappa, or the trace, that `relflat.papers.cost` times, and what they should give.

A layer of k x k weights and a batch; time does not depend on what the numbers are, so they are random.
"""

import ctypes
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.functional import hessian as autograd_hessian
from torch.func import functional_call
from torch.func import hessian as func_hessian

from relflat import reference, relative_flatness
from relflat.papers.measures import Subject
from relflat.papers.sheets import Sheet

SHEET = Sheet("cost")
PROBES: int = SHEET["probes"]
SAMPLES: int = SHEET["samples"]
WEIGHT = "0.weight"  # of the layer
STATUS = Path("/proc/self/status")


def loss_at(problem: Subject, weight: Float[Tensor, "k k"]) -> Float[Tensor, ""]:
    """The loss as a function of the layer's weight."""
    outputs = functional_call(problem.model, {WEIGHT: weight}, problem.inputs)
    return nn.functional.cross_entropy(outputs, problem.targets)


def problem(where: str, width: int, device: torch.device) -> Subject:
    """A layer of k classes, or with ReLU and an output layer of ten after it, and a batch; the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(width)
        layer = nn.Linear(width, width)
        tail = [] if where == "output" else [nn.ReLU(), nn.Linear(width, 10)]
        model = nn.Sequential(layer, *tail).to(device)
        inputs = torch.randn(SAMPLES, width).to(device)
        targets = torch.randint(width if where == "output" else 10, (SAMPLES,)).to(device)
    return Subject(model, inputs, targets, "0")


@dataclass(frozen=True)
class Value:
    """What a form gives: kappa, or the trace, and the standard error of an estimate; 0 where the form is exact."""

    value: float
    stderr: float = 0.0


def by_hessian(how: Callable[..., Any], problem: Subject) -> Value:
    """Kappa out of the whole Hessian: k^4 numbers."""
    weight = problem.model.get_parameter(WEIGHT).detach()
    H = how(partial(loss_at, problem), weight)
    return Value(float(torch.einsum("st,ut,srur->", weight, weight, H.detach())))


def hutchinson_trace(problem: Subject) -> Value:
    """``Tr H`` by products with random signs in the space of the weight, as the paper's layerwise measure needs."""
    weight = problem.model.get_parameter(WEIGHT).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_at(problem, weight), weight, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(PROBES):
        signs = torch.randint(0, 2, weight.shape, generator=generator).to(weight) * 2 - 1
        (along,) = torch.autograd.grad((gradient * signs).sum(), weight, retain_graph=True)
        found.append((along * signs).sum())
    values = torch.stack(found).double()
    return Value(float(values.mean()), float(values.std()) / math.sqrt(PROBES))


def by_library(options: Mapping[str, Any], problem: Subject) -> Value:
    """Kappa by `relflat.relative_flatness`."""
    batch = (problem.inputs, problem.targets)
    found = relative_flatness(problem.model, nn.CrossEntropyLoss(), batch, layer=problem.layer, **options)
    return Value(found.value, found.stderr)


@dataclass(frozen=True)
class Form:
    """One way to compute kappa, or the trace."""

    title: str
    of: Callable[[Subject], Value]
    places: tuple[str, ...] = tuple(SHEET["places"])
    hessian: bool = False  # it forms the whole Hessian
    most: int = 1024  # greatest k it is timed at
    trace: bool = False  # it estimates the trace, not kappa
    options: Mapping[str, Any] = field(default_factory=dict)  # of `relflat.relative_flatness`, where that does it


OWN: dict[str, Callable[[Subject], Value]] = {
    "rows": partial(by_hessian, autograd_hessian),
    "vectorised": partial(by_hessian, partial(autograd_hessian, vectorize=True)),
    "func": partial(by_hessian, lambda loss, weight: func_hessian(loss)(weight)),
    "trace": hutchinson_trace,
}
FORMS = {
    name: Form(of=OWN.get(name) or partial(by_library, values["options"]), **values)
    for name, values in SHEET["forms"].items()
}


def gigabytes(width: int) -> float:
    """Estimate of what a full Hessian takes: k^4 numbers, and some of k^2 x samples x 2 k on the way."""
    return 4 * (width**4 + 3 * width**2 * SAMPLES * 2 * width) / 1e9


def truth(problem: Subject) -> dict[str, float]:
    """Kappa and trace by `relflat.reference`, in double precision."""
    criterion = nn.CrossEntropyLoss()
    loss, W = reference.at_layer(problem.model, criterion, problem.inputs, problem.targets, problem.layer)
    H = reference.layer_hessian(loss, W.detach()).detach()
    kappa = float(reference.kappa_of_hessian(W.detach(), H))
    return {"kappa": kappa, "trace": float(H.reshape(W.numel(), -1).trace())}


def deviations(record: Mapping[str, Any]) -> dict[str, float]:
    """Each form's distance from the truth, in units of what is allowed: at most 1 is agreement.

    The truth is the reference's; where that is too large, the first form that is exact.
    """
    exact = (form["value"] for form in record["forms"].values() if form["stderr"] == 0)
    truths = {"kappa": next(exact, None), **record["reference"]}
    found = {}
    for name, form in record["forms"].items():
        known = truths.get("trace" if FORMS[name].trace else "kappa")
        if known is not None:
            allowed = SHEET["sigmas"] * form["stderr"] + SHEET["rtol"] * abs(known)
            found[name] = abs(form["value"] - known) / allowed
    return found


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
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", "utf-8")
        before = _kilobytes("VmRSS")
        work()
        return max(0, _kilobytes("VmHWM") - before) / 2**10
    except OSError:
        work()
        return None


def _kilobytes(key: str) -> int:
    """A line of the process's status."""
    lines = STATUS.read_text("utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])
