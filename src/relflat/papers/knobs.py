"""The algorithm ``fam-grokking``: FAM with the knobs of Han et al. (2025), which one experiment uses."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from relflat import FAM
from relflat.capture.kinds import weight_of
from relflat.capture.resolve import resolve
from relflat.errors import ConfigError
from relflat.lab.data.arrays import Inputs
from relflat.lab.names import names_in
from relflat.lab.train.algorithms import Fam, register
from relflat.lab.train.steps import Learner, Losses, plain_step


class KnobbedFAM(FAM):
    """`relflat.FAM` that is taken away after some steps, and whose layers' weights stay within a ball.

    A negative strength rewards growing weights, which says nothing about flatness; the cap closes that road, as long
    as the penalty is there. Both are functions of the step and the weights, so a resumed run needs nothing more.

    Args:
        loss: the criterion.
        model: the network.
        settings: of the algorithm.
        seed: of the probes.

    Raises:
        ConfigError: a negative number of steps, or a cap that is not positive.
    """

    def __init__(self, loss: nn.Module, model: nn.Module, settings: "FamGrokking", seed: int) -> None:
        after, cap = settings.remove_after, settings.weight_cap
        if after is not None and after < 0:
            raise ConfigError(f"remove_after={after}: give a number of steps, at least 0, or none.")
        if cap is not None and not cap > 0:
            raise ConfigError(f"weight_cap={cap}: the norm must be above 0, or none.")
        self._given, self._settings = 0.0, settings
        super().__init__(
            loss,
            model,
            names_in(settings.layer),
            **settings.options,
            temperature=settings.temperature,
            unit_features=settings.unit_features,
            seed=seed,
        )
        self._layers_of = [model]  # in a list: the criterion must not register the model as its part

    @property
    def strength(self) -> float:
        """The strength of the step to come."""
        return 0.0 if self._removed else self._given

    @strength.setter
    def strength(self, value: float) -> None:
        self._given = value

    @property
    def _removed(self) -> bool:
        return self._settings.remove_after is not None and self.step >= self._settings.remove_after

    @torch.no_grad()
    def cap(self) -> None:
        """Scale the weight of each layer down to the cap; to be called after the optimiser's step."""
        if self._settings.weight_cap is None or self._removed:
            return
        for target in resolve(self._layers_of[0], self.layers).values():
            weight = target if isinstance(target, nn.Parameter) else weight_of(target)
            weight.mul_((self._settings.weight_cap / weight.norm()).clamp(max=1))


def capped_step(learner: Learner, inputs: Inputs, targets: Tensor) -> Losses:
    """One gradient step, then the weights back within their cap."""
    losses = plain_step(learner, inputs, targets)
    if isinstance(learner.criterion, KnobbedFAM):
        learner.criterion.cap()
    return losses


@dataclass(frozen=True)
class FamGrokking(Fam):
    """FAM with the knobs of Han et al. (2025), for an output layer.

    Attributes:
        temperature: of the softmax in kappa.
        unit_features: kappa with features of norm 1.
        remove_after: steps after which the penalty is taken away; None: it stays.
        weight_cap: greatest norm of the layer's weight while the penalty is there; None: any.
    """

    step = staticmethod(capped_step)
    temperature: float = 1.0
    unit_features: bool = False
    remove_after: int | None = None
    weight_cap: float | None = None

    def criterion(self, loss: nn.Module, model: nn.Module, seed: int) -> nn.Module:
        """The task loss wrapped by `KnobbedFAM`."""
        return KnobbedFAM(loss, model, self, seed)


register("fam-grokking", FamGrokking)
