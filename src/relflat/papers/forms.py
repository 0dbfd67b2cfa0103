"""The ways to compute kappa, or the trace, that `relflat.papers.cost` times, and what they should give.

A layer of k x k weights and a batch; time does not depend on what the numbers are, so they are random.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.functional import hessian as autograd_hessian
from torch.func import functional_call
from torch.func import hessian as func_hessian

from relflat import reference, relative_flatness
from relflat.papers.sheets import Sheet

SHEET = Sheet("cost")
PROBES: int = SHEET["probes"]
SAMPLES: int = SHEET["samples"]


@dataclass(frozen=True)
class Problem:
    """A layer and a batch.

    Attributes:
        model: the layer alone, with k classes; or with ReLU and an output layer of ten classes after it.
        inputs: (n, k).
        targets: (n,).
        layer: its name.
    """

    model: nn.Sequential
    inputs: Float[Tensor, "n k"]
    targets: Tensor
    layer: str = "0"

    def loss(self, weight: Float[Tensor, "k k"]) -> Float[Tensor, ""]:
        """The loss as a function of the layer's weight."""
        outputs = functional_call(self.model, {"0.weight": weight}, (self.inputs,))
        return nn.functional.cross_entropy(outputs, self.targets)

    @property
    def weight(self) -> Float[Tensor, "k k"]:
        """The layer's weight, outside of any graph."""
        return self.model.get_parameter("0.weight").detach()


def problem(where: str, width: int, device: torch.device) -> Problem:
    """The problem of one place and width, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(width)
        layer = nn.Linear(width, width)
        tail = [] if where == "output" else [nn.ReLU(), nn.Linear(width, 10)]
        model = nn.Sequential(layer, *tail).to(device)
        inputs = torch.randn(SAMPLES, width).to(device)
        targets = torch.randint(width if where == "output" else 10, (SAMPLES,)).to(device)
    return Problem(model, inputs, targets)


@dataclass(frozen=True)
class Value:
    """What a form gives: kappa, or the trace, and the standard error of an estimate; 0 where the form is exact."""

    value: float
    stderr: float = 0.0


def by_hessian(how: Callable[..., Any], problem: Problem) -> Value:
    """Kappa out of the whole Hessian: k^4 numbers."""
    weight = problem.weight
    H = how(problem.loss, weight)
    return Value(float(torch.einsum("st,ut,srur->", weight, weight, H.detach())))


def all_at_once(loss: Callable[[Tensor], Tensor], weight: Float[Tensor, "k k"]) -> Float[Tensor, "k k k k"]:
    """The Hessian by `torch.func`."""
    found: Tensor = func_hessian(loss)(weight)
    return found


def hutchinson_trace(problem: Problem) -> Value:
    """``Tr H`` by products with random signs in the space of the weight, as the paper's layerwise measure needs."""
    weight = problem.weight.requires_grad_()
    (gradient,) = torch.autograd.grad(problem.loss(weight), weight, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(PROBES):
        signs = torch.randint(0, 2, weight.shape, generator=generator).to(weight) * 2 - 1
        (along,) = torch.autograd.grad((gradient * signs).sum(), weight, retain_graph=True)
        found.append((along * signs).sum())
    values = torch.stack(found).double()
    return Value(float(values.mean()), float(values.std()) / math.sqrt(PROBES))


def by_library(options: Mapping[str, Any], problem: Problem) -> Value:
    """Kappa by `relflat.relative_flatness`."""
    batch = (problem.inputs, problem.targets)
    found = relative_flatness(problem.model, nn.CrossEntropyLoss(), batch, layer=problem.layer, **options)
    return Value(found.value, found.stderr)


@dataclass(frozen=True)
class Form:
    """One way to compute kappa, or the trace.

    Attributes:
        title: in tables.
        of: does it.
        places: layers that it is for.
        hessian: it forms the whole Hessian.
        most: greatest k it is timed at.
        trace: it estimates the trace, not kappa.
        options: of `relflat.relative_flatness`, where that does it.
    """

    title: str
    of: Callable[[Problem], Value]
    places: tuple[str, ...] = tuple(SHEET["places"])
    hessian: bool = False
    most: int = 1024
    trace: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


OWN: dict[str, Callable[[Problem], Value]] = {
    "rows": partial(by_hessian, autograd_hessian),
    "vectorised": partial(by_hessian, partial(autograd_hessian, vectorize=True)),
    "func": partial(by_hessian, all_at_once),
    "trace": hutchinson_trace,
}
FORMS = {
    name: Form(of=OWN.get(name) or partial(by_library, values["options"]), **values)
    for name, values in SHEET["forms"].items()
}


def gigabytes(width: int) -> float:
    """Estimate of what a full Hessian takes: k^4 numbers, and some of k^2 x samples x 2 k on the way."""
    return 4 * (width**4 + 3 * width**2 * SAMPLES * 2 * width) / 1e9


def truth(problem: Problem) -> dict[str, float]:
    """Kappa and trace by `relflat.reference`, in double precision."""
    loss, weight = reference.at_layer(
        problem.model, nn.CrossEntropyLoss(), problem.inputs, problem.targets, problem.layer
    )
    H = reference.layer_hessian(loss, weight.detach()).detach()
    kappa = float(reference.kappa_of_hessian(weight.detach(), H))
    return {"kappa": kappa, "trace": float(H.reshape(weight.numel(), -1).trace())}


def deviations(record: Mapping[str, Any]) -> dict[str, float]:
    """Each form's distance from the truth, in units of what is allowed: at most 1 is agreement.

    The truth is the reference's; where that is too large, the first form that is exact.
    """
    forms = record["forms"]
    exact = [form["value"] for form in forms.values() if form["stderr"] == 0]
    found = {}
    for name, form in forms.items():
        known = record["reference"].get("trace" if FORMS[name].trace else "kappa")
        if known is None and not FORMS[name].trace and exact:
            known = exact[0]
        if known is not None:
            allowed = SHEET["sigmas"] * form["stderr"] + SHEET["rtol"] * abs(known)
            found[name] = abs(form["value"] - known) / allowed
    return found
