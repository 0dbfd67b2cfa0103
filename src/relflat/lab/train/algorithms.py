"""Training algorithms: an algorithm is a frozen record of its settings that knows what it does with a run.

It may wrap the task's loss, wrap the task's optimiser, or make the update in another way. To add one, write a
subclass of `Algorithm` whose docstring says what each setting is, and name it in ``ALGORITHMS`` below; from outside
this package, call ``register``.
"""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial
from importlib import import_module
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relflat import FAM
from relflat.capture.resolve import resolve
from relflat.errors import ConfigError
from relflat.lab.common.names import look_up, names_in
from relflat.lab.train.steps import looksam_step, plain_step, sam_step
from relflat.sizing import BOUND

BaseOptimizer = Callable[[Iterable[Any]], Optimizer]
Parameters = Iterable[nn.Parameter]


@dataclass(frozen=True)
class Algorithm:
    """Plain training: the task's loss and the task's optimiser, as they are; ``step`` updates the parameters once."""

    two_passes: ClassVar[bool] = False  # forward and backward a step, which a loss scaled for fp16 cannot follow
    step = staticmethod(plain_step)

    def criterion(self, loss: nn.Module, model: nn.Module, seed: int) -> nn.Module:
        """The task loss, wrapped; ``seed`` is for what draws random numbers of its own."""
        return loss

    def optimizer(self, parameters: Parameters, base: BaseOptimizer) -> Optimizer:
        """The task's optimiser, wrapped."""
        return base(parameters)


@dataclass(frozen=True)
class Sam(Algorithm):
    """Sharpness-aware minimisation (Foret et al. 2021).

    Attributes:
        rho: radius of the step uphill.
        adaptive: the elementwise form (of SAM: ASAM, Kwon et al. 2021).
    """

    two_passes = True
    step = staticmethod(sam_step)
    rho: float = 0.05
    adaptive: bool = False

    def optimizer(self, parameters: Parameters, base: BaseOptimizer) -> Optimizer:
        """The task's optimiser inside pytorch_optimizer's SAM."""
        from pytorch_optimizer import SAM

        return SAM(parameters, cast(type[Optimizer], base), rho=self.rho, adaptive=self.adaptive)


@dataclass(frozen=True)
class LookSam(Algorithm):
    """SAM's second pass every few steps, its direction kept in between (Liu et al. 2022).

    Attributes:
        rho: radius of the step uphill.
        period: steps from one second pass to the next.
        alpha: weight of the direction kept in between.
    """

    two_passes = True
    step = staticmethod(looksam_step)
    rho: float = 0.05
    period: int = 5
    alpha: float = 0.7

    def optimizer(self, parameters: Parameters, base: BaseOptimizer) -> Optimizer:
        """The task's optimiser inside pytorch_optimizer's LookSAM."""
        from pytorch_optimizer import LookSAM

        if self.period < 1:
            raise ConfigError(f"period={self.period} must be above 0.")
        return LookSAM(parameters, cast(type[Optimizer], base), rho=self.rho, k=self.period, alpha=self.alpha)


@dataclass(frozen=True)
class Smoothing(Algorithm):
    """Label smoothing (Szegedy et al. 2016).

    Attributes:
        smoothing: share of each target that is spread over all classes.
    """

    smoothing: float = 0.1

    def criterion(self, loss: nn.Module, model: nn.Module, seed: int) -> nn.Module:
        """Cross-entropy against smoothed targets."""
        if type(loss) is not nn.CrossEntropyLoss:
            raise ConfigError(
                f"Label smoothing needs a task whose loss is CrossEntropyLoss, not {type(loss).__name__}; "
                "choose another algorithm."
            )
        if not 0 <= self.smoothing <= 1:
            raise ConfigError(f"smoothing={self.smoothing} must lie between 0 and 1.")
        smoothed = copy.deepcopy(loss)
        smoothed.label_smoothing = self.smoothing
        return smoothed


class Disturbed(nn.Module):
    """The task loss of a model whose layers are given changed inputs in training mode, until ``close``."""

    def __init__(self, loss: nn.Module, model: nn.Module, layers: str, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss
        self._handles = []

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            return (change(args[0]), *args[1:]) if module.training else None

        own = dict(model.named_children())
        wanted = [own.get(n, n) if n == "output" else n for n in names_in(layers)]
        for name, layer in resolve(model, wanted).items():  # of a model that is not run: "output" by its name only
            if isinstance(layer, nn.Module):
                self._handles.append(layer.register_forward_pre_hook(before))
            elif name in layers.replace(" ", "").split(","):  # not one among those of a glob
                raise ConfigError(f"layer={layers!r}: {name!r} is a parameter, which has no input.")
        if not self._handles:
            raise ConfigError(f"layer={layers!r}: no layer with an input.")

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The task loss."""
        loss: Tensor = self.loss(outputs, targets)
        return loss

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


@dataclass(frozen=True)
class Dropout(Algorithm):
    """Dropout on the inputs of layers.

    Attributes:
        rate: probability with which an entry is dropped.
        layer: the layers it acts on, by name or glob; several with commas.
    """

    rate: float = 0.1
    layer: str = "*"

    def criterion(self, loss: nn.Module, model: nn.Module, seed: int) -> nn.Module:
        """The task loss, with dropout hooked into the model (Srivastava et al. 2014)."""
        if not 0 <= self.rate < 1:
            raise ConfigError(f"rate={self.rate} must lie between 0 and 1, 1 excluded.")
        return Disturbed(loss, model, self.layer, partial(nn.functional.dropout, p=self.rate))


@dataclass(frozen=True)
class Noise(Algorithm):
    """Plain Gaussian noise on the inputs of layers.

    Attributes:
        sigma: standard deviation of the noise.
        layer: the layers it acts on, by name or glob; several with commas.
    """

    sigma: float = 0.1
    layer: str = "*"

    def criterion(self, loss: nn.Module, model: nn.Module, seed: int) -> nn.Module:
        """The task loss, with noise hooked into the model (Camuto et al. 2020)."""
        if not self.sigma >= 0:
            raise ConfigError(f"sigma={self.sigma} must not be negative.")
        return Disturbed(loss, model, self.layer, lambda x: x + self.sigma * torch.randn_like(x))


@dataclass(frozen=True)
class Fam(Algorithm):
    """Relative flatness aware minimisation; meanings and defaults are those of `relflat.FAM`.

    Attributes:
        strength: lambda of the paper, on kappa without division by m, in place of a size.
        layer: the layers it acts on, by name or glob; several with commas; else all, or with a strength the output.
        size: lambda times the number of layers.
        bound: largest penalty of a step as a share of its loss; inf for no bound.
        radius: finite radius of the feature noise instead of kappa itself.
        curvature: what kappa is made of.
        gradient: which part of Lemma 1 is used.
        method: how kappa is computed.
        probes: random probes a step where kappa is not exact.
        adaptive: the elementwise form (of kappa).
        every: add the penalty every so many steps, multiplied by this.
        normalize_features: divide features by their deviation.
        layers_per_step: of several layers, draw so many for each step, else take all.
    """

    strength: float | None = None
    layer: str | None = None
    size: float | None = None
    bound: float | None = BOUND
    radius: float | None = None
    curvature: Literal["ggn", "hessian"] = "ggn"
    gradient: Literal["full", "frozen", "weights"] = "full"
    method: Literal["auto", "closed_form", "exact", "probe", "finite_difference"] = "auto"
    probes: int = 1
    adaptive: bool = False
    every: int | None = None
    normalize_features: bool = False
    layers_per_step: int | None = None

    def __post_init__(self) -> None:
        if self.bound == math.inf:  # which JSON does not have
            object.__setattr__(self, "bound", None)

    def criterion(self, loss: nn.Module, model: nn.Module, seed: int) -> nn.Module:
        """The task loss wrapped by `relflat.FAM`."""
        layer = "output" if self.layer is None and self.strength is not None else self.layer
        return FAM(loss, model, layer if layer is None else names_in(layer), **self.options, seed=seed)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `relflat.FAM` that these settings stand for."""
        return {field.name: getattr(self, field.name) for field in fields(Fam) if field.name != "layer"}


@dataclass(frozen=True)
class FamSam(Fam):
    """FAM's criterion under SAM's optimiser.

    Attributes:
        rho: radius of the step uphill.
    """

    two_passes = True
    step = staticmethod(sam_step)
    rho: float = 0.05

    def optimizer(self, parameters: Parameters, base: BaseOptimizer) -> Optimizer:
        """The task's optimiser inside SAM; ``adaptive`` is FAM's here."""
        return Sam(self.rho).optimizer(parameters, base)


ALGORITHMS: dict[str, type[Algorithm]] = {
    "plain": Algorithm,
    "sam": Sam,
    "fam": Fam,
    "fam-sam": FamSam,
    "looksam": LookSam,
    "smoothing": Smoothing,
    "dropout": Dropout,
    "noise": Noise,
}
PROVIDERS = ("relflat.papers.knobs",)  # modules that register further algorithms when they are imported


def register(name: str, algorithm: type[Algorithm]) -> None:
    """Make an algorithm known under a name, so that runs can be configured by it."""
    ALGORITHMS[name] = algorithm


def all_algorithms() -> dict[str, type[Algorithm]]:
    """Those of this module and of all providers."""
    for module in PROVIDERS:
        import_module(module)
    return ALGORITHMS


def algorithm_named(name: str) -> type[Algorithm]:
    """The algorithm of this name; the providers are imported only for a name that is not known without them."""
    return look_up("algorithm", name, ALGORITHMS if name in ALGORITHMS else all_algorithms())
