"""Training algorithms: each has settings, what it wraps, and one step function.

A step takes one batch, updates the parameters once and returns what it minimised. BatchNorm statistics
move once a step, whatever the number of forward passes.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from accelerate import Accelerator
from pytorch_optimizer import SAM, LookSAM
from torch import Tensor, nn
from torch.optim import Optimizer

from relflat import FAM
from relflat.errors import ConfigError
from relflat.lab.data.arrays import Inputs
from relflat.lab.names import names_in
from relflat.lab.train.disturb import Disturbed, dropout, noise
from relflat.lab.train.evaluate import run
from relflat.papers.knobs import KnobbedFAM

BaseOptimizer = Callable[[Iterable[Any]], Optimizer]


class Losses(NamedTuple):
    """What a step minimised.

    Attributes:
        total: task loss plus penalty.
        penalty: the penalty alone; nan where the forward pass itself was perturbed and it is not known apart.
    """

    total: Tensor
    penalty: float


@dataclass
class Learner:
    """What a step works with.

    Attributes:
        accelerator: runs the backward pass.
        model: in training mode.
        criterion: the task loss, wrapped by the algorithm.
        optimizer: the base optimiser, wrapped by the algorithm.
    """

    accelerator: Accelerator
    model: nn.Module
    criterion: nn.Module
    optimizer: Optimizer


@dataclass(frozen=True)
class PlainSettings:
    """Plain training has no settings of its own."""


@dataclass(frozen=True)
class SamSettings:
    """Sharpness-aware minimisation (Foret et al. 2021).

    Attributes:
        rho: radius of the step uphill.
        adaptive: scale it elementwise by the weights (ASAM, Kwon et al. 2021).
    """

    rho: float = 0.05
    adaptive: bool = False


@dataclass(frozen=True)
class LookSamSettings:
    """SAM's second pass every few steps, its direction kept in between (Liu et al. 2022).

    Attributes:
        rho: radius of the step uphill.
        period: steps from one second pass to the next.
        alpha: weight of the kept direction.
    """

    rho: float = 0.05
    period: int = 5
    alpha: float = 0.7


@dataclass(frozen=True)
class SmoothingSettings:
    """Label smoothing (Szegedy et al. 2016).

    Attributes:
        smoothing: share of each target that is spread over all classes.
    """

    smoothing: float = 0.1


@dataclass(frozen=True)
class DropoutSettings:
    """Dropout on the inputs of layers.

    Attributes:
        rate: probability with which an entry is dropped.
        layer: the layers, by name or glob; several with commas.
    """

    rate: float = 0.1
    layer: str = "*"


@dataclass(frozen=True)
class NoiseSettings:
    """Plain Gaussian noise on the inputs of layers.

    Attributes:
        sigma: its standard deviation.
        layer: the layers, by name or glob; several with commas.
    """

    sigma: float = 0.1
    layer: str = "*"


@dataclass(frozen=True)
class FamSettings:
    """Relative flatness aware minimisation; the meanings are those of `relflat.FAM`.

    Attributes:
        strength: lambda of the paper, on kappa without division by m.
        layer: the layer, by name or glob; several with commas.
        radius: finite radius of the feature noise; None for kappa itself.
        curvature: what kappa is made of.
        gradient: which part of Lemma 1 is used.
        method: how kappa is computed.
        probes: random probes a step where it is not exact.
        adaptive: the elementwise form.
        every: add the penalty every so many steps.
        warmup_steps: steps over which the strength grows from 0.
        normalize_features: divide features by their deviation.
        temperature: of the softmax in kappa, for an output layer.
        unit_features: kappa with features of norm 1, for an output layer.
        remove_after: steps after which the penalty is taken away; None: it stays.
        weight_cap: greatest norm of the layer's weight while the penalty is there; None: any.
        layers_per_step: of several layers, draw so many for each step; None: all.
    """

    strength: float = 0.1
    layer: str = "output"
    radius: float | None = None
    curvature: Literal["ggn", "hessian"] = "ggn"
    gradient: Literal["full", "frozen", "weights"] = "full"
    method: Literal["auto", "closed_form", "exact", "probe", "finite_difference"] = "auto"
    probes: int = 1
    adaptive: bool = False
    every: int = 1
    warmup_steps: int = 0
    normalize_features: bool = False
    temperature: float = 1.0
    unit_features: bool = False
    remove_after: int | None = None
    weight_cap: float | None = None
    layers_per_step: int | None = None


@dataclass(frozen=True)
class FamSamSettings(FamSettings):
    """FAM's criterion under SAM's optimiser.

    Attributes:
        rho: radius of the step uphill.
    """

    rho: float = 0.05


def plain_step(learner: Learner, inputs: Inputs, targets: Tensor) -> Losses:
    """One gradient step on the task loss."""
    loss = backward(learner, inputs, targets)
    learner.optimizer.step()
    return Losses(loss, 0.0)


def sam_step(learner: Learner, inputs: Inputs, targets: Tensor) -> Losses:
    """A step uphill, then the gradient from there applied to the old weights; two passes.

    FAM as the criterion draws the same probes in both and counts them as one step.
    """
    step = get_counter(learner.criterion)
    loss = backward(learner, inputs, targets)
    penalty = penalty_of(learner.criterion)

    def uphill() -> float:
        set_counter(learner.criterion, step)
        with buffers_kept(learner.model):
            return float(backward(learner, inputs, targets))

    learner.optimizer.step(uphill)
    cap_weights(learner.criterion)
    return Losses(loss, penalty)


def looksam_step(learner: Learner, inputs: Inputs, targets: Tensor) -> Losses:
    """SAM's two passes when it is time for them, else one pass and the direction kept from then."""
    inner = cast(LookSAM, getattr(learner.optimizer, "optimizer", learner.optimizer))
    done: int = inner.param_groups[0].get("looksam_step", 0)  # part of the optimiser's state
    if done % inner.k == 0:
        return sam_step(learner, inputs, targets)
    losses: list[Tensor] = []

    def here() -> float:
        losses.append(backward(learner, inputs, targets))
        return 0.0

    learner.optimizer.step(here)
    return Losses(losses[0], 0.0)


def fam_step(learner: Learner, inputs: Inputs, targets: Tensor) -> Losses:
    """One gradient step on the task loss plus the penalty, which `relflat.FAM` adds inside the criterion."""
    loss = backward(learner, inputs, targets)
    learner.optimizer.step()
    cap_weights(learner.criterion)
    return Losses(loss, penalty_of(learner.criterion))


def backward(learner: Learner, inputs: Inputs, targets: Tensor) -> Tensor:
    """Fresh gradients of the criterion on a batch; returns its value."""
    learner.optimizer.zero_grad()
    loss: Tensor = learner.criterion(run(learner.model, inputs), targets)
    learner.accelerator.backward(loss)
    return loss.detach()


def cap_weights(criterion: nn.Module) -> None:
    """Keep the weights of FAM's layers within their cap, where there is one."""
    if isinstance(criterion, KnobbedFAM):
        criterion.cap()


def penalty_of(criterion: nn.Module) -> float:
    """What FAM added in its last call; 0 for other criteria."""
    return float(criterion.last["penalty"]) if isinstance(criterion, FAM) else 0.0


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Undo what the passes inside do to the buffers (running statistics and their counters)."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def task_loss(loss: nn.Module, model: nn.Module, settings: Any, seed: int) -> nn.Module:
    """The criterion of algorithms that leave the loss alone."""
    return loss


def fam_loss(loss: nn.Module, model: nn.Module, settings: FamSettings, seed: int) -> nn.Module:
    """The task loss wrapped by `relflat.FAM`."""
    return KnobbedFAM(
        loss,
        model,
        names_in(settings.layer),
        strength=settings.strength,
        radius=settings.radius,
        curvature=settings.curvature,
        gradient=settings.gradient,
        method=settings.method,
        probes=settings.probes,
        adaptive=settings.adaptive,
        every=settings.every,
        warmup_steps=settings.warmup_steps,
        normalize_features=settings.normalize_features,
        temperature=settings.temperature,
        unit_features=settings.unit_features,
        remove_after=settings.remove_after,
        weight_cap=settings.weight_cap,
        layers_per_step=settings.layers_per_step,
        seed=seed,
    )


def smoothed_loss(loss: nn.Module, model: nn.Module, settings: SmoothingSettings, seed: int) -> nn.Module:
    """Cross-entropy against smoothed targets."""
    if type(loss) is not nn.CrossEntropyLoss:
        raise ConfigError(
            f"Label smoothing needs a task whose loss is CrossEntropyLoss, not {type(loss).__name__}; "
            "choose another algorithm."
        )
    if not 0 <= settings.smoothing <= 1:
        raise ConfigError(f"smoothing={settings.smoothing} must lie between 0 and 1.")
    smoothed = copy.deepcopy(loss)
    smoothed.label_smoothing = settings.smoothing
    return smoothed


def dropout_loss(loss: nn.Module, model: nn.Module, settings: DropoutSettings, seed: int) -> nn.Module:
    """The task loss, with dropout hooked into the model."""
    return Disturbed(loss, model, settings.layer, dropout(settings.rate))


def noise_loss(loss: nn.Module, model: nn.Module, settings: NoiseSettings, seed: int) -> nn.Module:
    """The task loss, with noise hooked into the model."""
    return Disturbed(loss, model, settings.layer, noise(settings.sigma))


def base_optimizer(parameters: Iterable[nn.Parameter], base: BaseOptimizer, settings: Any) -> Optimizer:
    """The task's own optimiser."""
    return base(parameters)


def sam_optimizer(
    parameters: Iterable[nn.Parameter], base: BaseOptimizer, settings: SamSettings
) -> Optimizer:
    """The task's optimiser inside pytorch_optimizer's SAM."""
    return SAM(parameters, cast(type[Optimizer], base), rho=settings.rho, adaptive=settings.adaptive)


def looksam_optimizer(
    parameters: Iterable[nn.Parameter], base: BaseOptimizer, settings: LookSamSettings
) -> Optimizer:
    """The task's optimiser inside pytorch_optimizer's LookSAM."""
    if settings.period < 1:
        raise ConfigError(f"period={settings.period} must be above 0.")
    return LookSAM(
        parameters,
        cast(type[Optimizer], base),
        rho=settings.rho,
        k=settings.period,
        alpha=settings.alpha,
    )


def fam_sam_optimizer(
    parameters: Iterable[nn.Parameter], base: BaseOptimizer, settings: FamSamSettings
) -> Optimizer:
    """As ``sam_optimizer``; ``adaptive`` is FAM's here."""
    return SAM(parameters, cast(type[Optimizer], base), rho=settings.rho)


@dataclass(frozen=True)
class Algorithm:
    """One way to train.

    Attributes:
        settings: class of its settings.
        step: one update.
        criterion: wraps the task loss.
        optimizer: wraps the task's optimiser.
    """

    settings: type[Any]
    step: Callable[[Learner, Inputs, Tensor], Losses]
    criterion: Callable[[nn.Module, nn.Module, Any, int], nn.Module] = task_loss
    optimizer: Callable[[Iterable[nn.Parameter], BaseOptimizer, Any], Optimizer] = base_optimizer


ALGORITHMS: dict[str, Algorithm] = {
    "plain": Algorithm(PlainSettings, plain_step),
    "sam": Algorithm(SamSettings, sam_step, optimizer=sam_optimizer),
    "fam": Algorithm(FamSettings, fam_step, criterion=fam_loss),
    "fam-sam": Algorithm(FamSamSettings, sam_step, criterion=fam_loss, optimizer=fam_sam_optimizer),
    "looksam": Algorithm(LookSamSettings, looksam_step, optimizer=looksam_optimizer),
    "smoothing": Algorithm(SmoothingSettings, plain_step, criterion=smoothed_loss),
    "dropout": Algorithm(DropoutSettings, plain_step, criterion=dropout_loss),
    "noise": Algorithm(NoiseSettings, plain_step, criterion=noise_loss),
}


def release(criterion: nn.Module) -> None:
    """Remove what the criterion hooked into the model."""
    if isinstance(criterion, FAM | Disturbed):
        criterion.close()


def get_counter(criterion: nn.Module) -> int:
    """The step number that, with its seed, determines FAM's probes; 0 for criteria without one."""
    return criterion.step if isinstance(criterion, FAM) else 0


def set_counter(criterion: nn.Module, step: int) -> None:
    """Put back what ``get_counter`` returned."""
    if isinstance(criterion, FAM):
        criterion.step = step
