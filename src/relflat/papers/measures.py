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

from relflat import relative_flatness
from relflat.capture.kinds import weight_of
from relflat.capture.resolve import resolve_unrun
from relflat.landscape import layer_spectrum, max_eigenvalue_flatness
from relflat.theory.sharpness import Ball, kept, rise_within

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

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Inputs and targets, a chunk at a time."""
        return list(zip(torch.split(self.inputs, CHUNK), torch.split(self.targets, CHUNK), strict=True))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def weight(self) -> Tensor:
        """The layer's weight."""
        (target,) = resolve_unrun(self.model, [self.layer]).values()
        return target if isinstance(target, nn.Parameter) else weight_of(target)


def flatness(subject: Subject, number: str = "value", **options: Any) -> float:
    """A number of `relflat.relative_flatness`; by the closed form, or the sum over a basis."""
    criterion = nn.CrossEntropyLoss()
    found = relative_flatness(subject.model, criterion, subject.batches, layer=subject.layer, **options)
    return float(getattr(found, number))


def kappa_max(subject: Subject) -> float:
    """``sum_s ||w_s||^2 lambda_max(H_ss)`` (Petzka et al. 2021, the maximum-eigenvalue version)."""
    criterion = nn.CrossEntropyLoss()
    return max_eigenvalue_flatness(subject.model, criterion, subject.batches, layer=subject.layer, rtol=1e-8).value


def weight_norm(subject: Subject) -> float:
    """``||W||_F`` of the layer."""
    return float(subject.weight.detach().double().norm())


def lambda_max(subject: Subject) -> float:
    """Largest eigenvalue of the Hessian with respect to the layer's weight: `relflat.landscape.layer_spectrum`."""
    given: Any = {"layer": subject.layer, "draws": 1, "max_products": LANCZOS}
    return layer_spectrum(subject.model, nn.CrossEntropyLoss(), subject.batches, **given).top.value


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


def sam_sharpness(subject: Subject, rho: float = 0.05, steps: int = 10, *, adaptive: bool = False) -> float:
    """``max_{||e|| <= rho} L(theta + e) - L(theta)``, from below: :func:`relflat.theory.sharpness.rise_within`."""
    parameters = list(subject.parameters.values())
    ball: Ball = "adaptive" if adaptive else "sphere"
    return rise_within(ball, rho, parameters, lambda: _loss_and_gradients(subject, parameters), steps)


@torch.no_grad()
def loss_of(subject: Subject) -> float:
    """Mean cross-entropy."""
    return sum(float(_summed_loss(subject, *batch)) for batch in subject.batches) / len(subject.targets)


@torch.no_grad()
def accuracy(subject: Subject) -> float:
    """Share that is right."""
    right = sum(int((subject.model(x).argmax(1) == y).sum()) for x, y in subject.batches)
    return right / len(subject.targets)


def _summed_loss(subject: Subject, inputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(subject.model(inputs), targets, reduction="sum")


def _loss_and_gradients(subject: Subject, parameters: list[nn.Parameter]) -> tuple[float, list[Tensor]]:
    total, gradients = 0.0, [torch.zeros_like(p) for p in parameters]
    for inputs, targets in subject.batches:
        loss = _summed_loss(subject, inputs, targets) / len(subject.targets)
        total += float(loss.detach())
        for sum_so_far, part in zip(gradients, torch.autograd.grad(loss, parameters), strict=True):
            sum_so_far += part
    return total, gradients


@dataclass(frozen=True)
class Measure:
    """A measure as reports show it: its title, where it is from and what computes it."""

    title: str
    source: str
    of: Callable[[Subject], float]


MEASURES: dict[str, Measure] = {
    "kappa": Measure("kappa", "Petzka et al. 2021", flatness),  # Definition 3
    # section 5: a feature that never varies, such as a dead neuron's, has no deviation to divide by and is left out
    "kappa_normalized": Measure(
        "kappa, features / sd", "Petzka et al. 2021", partial(flatness, normalize_features=True)
    ),
    "kappa_adaptive": Measure("kappa, adaptive", "this library", partial(flatness, adaptive=True)),
    "kappa_max": Measure("kappa, largest eigenvalues", "Petzka et al. 2021", kappa_max),
    "layerwise": Measure("||W||² Tr H", "Adilova et al. 2023", partial(flatness, number="layerwise")),
    "trace": Measure("Tr H", "Keskar et al. 2017", partial(flatness, number="trace")),
    "lambda_max": Measure("lambda_max(H)", "Keskar et al. 2017", lambda_max),
    "weight_norm": Measure("||W||", "Neyshabur et al. 2015", weight_norm),
    "fisher_rao": Measure("Fisher-Rao norm", "Liang et al. 2019", fisher_rao),
    "pac_bayes": Measure("PAC-Bayes flatness", "Jiang et al. 2020", pac_bayes),
    "sam": Measure("SAM sharpness", "Foret et al. 2021", sam_sharpness),
    "asam": Measure("ASAM sharpness", "Kwon et al. 2021", partial(sam_sharpness, rho=0.5, adaptive=True)),
}
