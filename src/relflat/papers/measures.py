"""Measures of flatness and size that the papers hold against relative flatness, each from its own definition.

All of them are of the cross-entropy over all samples given, deterministic, and leave the network as they found it.
Those of one layer take its name; the others are of all trained parameters.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, jvp

from relflat import measures, relative_flatness
from relflat.papers.sheets import Sheet
from relflat.theory.sharpness import kept

CHUNK = 1000  # samples at a time
PAC_BAYES_DEVIATION = 0.1  # loss of accuracy that defines the measure (Jiang et al. 2020)
LANCZOS = 60  # products for the largest eigenvalue
WIDEST = 2.0**20  # standard deviation at which the search of PAC-Bayes gives up


@dataclass(frozen=True)
class Subject:
    """A classifier in evaluation mode and the samples it is measured on, of the dtype of its parameters."""

    model: nn.Module
    inputs: Float[Tensor, "n ..."]
    targets: Int[Tensor, " n"]
    layer: str
    steps: int = 10  # of gradient ascent for the sharpness

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Inputs and targets, a chunk at a time."""
        return list(zip(torch.split(self.inputs, CHUNK), torch.split(self.targets, CHUNK), strict=True))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def measured(subject: Subject, name: str) -> float:
    """A number of `relflat.measures`, eigenvalues to eight digits."""
    exact: dict[str, Any] = {"draws": 1, "max_products": LANCZOS, "rtol": 1e-8, "steps": subject.steps}
    given = (subject.model, nn.CrossEntropyLoss(), subject.batches)
    return measures(*given, layer=subject.layer, only=[name], **exact)[name].value


def flatness(subject: Subject, **options: Any) -> float:
    """A form of kappa: `relflat.relative_flatness`, by the closed form or the sum over a basis."""
    given = (subject.model, nn.CrossEntropyLoss(), subject.batches)
    return relative_flatness(*given, layer=subject.layer, **options).value


@torch.no_grad()
def fisher_rao(subject: Subject) -> float:
    """Fisher-Rao norm ``sqrt(E <theta, grad l>^2)`` (Liang et al. 2019, Definition 2; labels as given).

    Their closed form ``(L + 1)^2 E <dl/df, f>^2`` is the same for ReLU networks of L hidden layers without biases;
    this one, ``<dl/df, J theta>`` with one forward-mode pass, holds for any network.
    """
    theta = {name: p.detach() for name, p in subject.parameters.items()}
    total = 0.0
    for inputs, targets in subject.batches:
        outputs = partial(functional_call, subject.model, args=inputs)
        logits, change = jvp(outputs, (theta,), (theta,))[:2]
        residual = logits.softmax(1) - nn.functional.one_hot(targets, logits.shape[1])
        total += float((residual * change).sum(1).double().square().sum())
    return math.sqrt(total / len(subject.targets))


@torch.no_grad()
def pac_bayes(subject: Subject, draws: int = 10, rtol: float = 1e-3) -> float:
    """PAC-Bayes flatness ``1 / sigma^2`` (Jiang et al. 2020, appendix on PAC-Bayes measures).

    sigma is the deviation of isotropic Gaussian noise on all parameters that costs 0.1 of the training accuracy on
    average; found by bisection to ``rtol``, with the same draws of noise at each step. 0: no noise costs as much.
    """
    wanted = accuracy(subject) - PAC_BAYES_DEVIATION

    def enough(sigma: float) -> bool:
        generator = torch.Generator().manual_seed(0)
        found = []
        for _ in range(draws):
            with kept(subject.model.parameters()):
                for p in subject.parameters.values():
                    noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                    p.add_((sigma * noise).to(p))
                found.append(accuracy(subject))
        return sum(found) / draws <= wanted

    low = high = 1e-2
    while enough(low):
        low /= 2
    while not enough(high):
        high *= 2
        if high > WIDEST:
            return 0.0
    while high > low * (1 + rtol):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return 1 / (low * high)


@torch.no_grad()
def accuracy(subject: Subject) -> float:
    """Share that is right."""
    right = sum(int((subject.model(x).argmax(1) == y).sum()) for x, y in subject.batches)
    return right / len(subject.targets)


@dataclass(frozen=True)
class Measure:
    """A measure as reports show it: its title, where it is from and what computes it."""

    title: str
    source: str
    of: Callable[[Subject], float]


OWN: dict[str, Callable[[Subject], float]] = {"fisher_rao": fisher_rao, "pac_bayes": pac_bayes}


def measure(name: str, title: str, source: str, of: str = "", **form: Any) -> Measure:
    """One of the table: a number ``of`` `relflat.measures`, a form of kappa, or one of this module's own."""
    return Measure(title, source, OWN.get(name) or (partial(measured, name=of) if of else partial(flatness, **form)))


MEASURES = {name: measure(name, **table) for name, table in Sheet("measures")["measures"].items()}
