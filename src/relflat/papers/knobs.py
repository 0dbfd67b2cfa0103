"""The algorithm ``fam-grokking``: FAM with the knobs of Han et al. (2025), which one experiment uses."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relflat import FAM
from relflat.capture.kinds import weight_of
from relflat.errors import ConfigError
from relflat.estimate import closed_form
from relflat.estimate.contributions import Contributions
from relflat.estimate.methods import Method, register
from relflat.estimate.subject import Subject
from relflat.lab.common.names import names_in
from relflat.lab.data.arrays import Inputs
from relflat.lab.train import algorithms
from relflat.lab.train.algorithms import Fam
from relflat.lab.train.steps import Learner, Losses, plain_step
from relflat.rng import Rng


def closed_form_of(temperature: float, unit_features: bool) -> Method:
    """Kappa in closed form with the softmax of ``logits / temperature``, and with features of norm 1 if so wanted."""
    if not temperature > 0:
        raise ConfigError(f"temperature={temperature}: a positive number is needed")
    name = f"closed_form(temperature={temperature:g}, unit_features={unit_features})"

    def why_not(subject: Subject) -> str | None:
        known = subject.scene.known
        if known is not None and known.elementwise and temperature != 1:
            return f"temperature={temperature} needs a softmax: only for cross-entropy"
        return closed_form.why_not(subject.calls, known)

    def run(subjects: Sequence[Subject], rng: Rng) -> dict[str, Contributions]:
        found = {}
        for s in subjects:
            known, space = s.scene.known, s.output_space()
            assert known is not None
            logits = known.outputs if s.options.full else known.outputs.detach()
            hessian = closed_form.by_rows(s.calls[0], known.hessian_at(logits / temperature))
            phi = space.features.flatten(0, 2)
            phi = F.normalize(phi, dim=-1, eps=1e-30) if unit_features else phi
            part = closed_form.from_features(phi, space.weight, hessian, s.options)
            found[s.layer] = replace(part, method=name)
        return found

    return register(Method(name, why_not, run, automatic=False))


class KnobbedFAM(FAM):
    """`relflat.FAM` with another kappa, taken away after some steps, its layers' weights within a ball until then.

    A negative strength rewards growing weights, which says nothing about flatness; the cap closes that road, as long
    as the penalty is there. Both are functions of the step and the weights, so a resumed run needs nothing more.
    """

    def __init__(self, loss: nn.Module, model: nn.Module, settings: "FamGrokking", seed: int) -> None:
        after, cap, options = settings.remove_after, settings.weight_cap, settings.options
        if after is not None and after < 0:
            raise ConfigError(f"remove_after={after}: give a number of steps, at least 0, or none.")
        if cap is not None and not cap > 0:
            raise ConfigError(f"weight_cap={cap}: the norm must be above 0, or none.")
        if settings.temperature != 1 or settings.unit_features:
            if settings.method not in ("auto", "closed_form"):
                raise ConfigError(
                    f"temperature and unit_features change the closed form, and method={settings.method!r} is "
                    "another one; use method='auto'"
                )
            options["method"] = closed_form_of(settings.temperature, settings.unit_features).name
        given = options["strength"]
        if after is not None:
            at = given if callable(given) else lambda step: given
            options["strength"] = lambda step: 0.0 if step >= after else at(step)
        self._settings = settings
        super().__init__(loss, model, names_in(settings.layer or "*"), **options, seed=seed)

    @torch.no_grad()
    def cap(self) -> None:
        """Scale the weight of each layer down to the cap; to be called after the optimiser's step."""
        cap, after = self._settings.weight_cap, self._settings.remove_after
        if cap is None or (after is not None and self.step >= after):
            return
        for target in self._tap.layers.values():
            weight = target if isinstance(target, nn.Parameter) else weight_of(target)
            weight.mul_((cap / weight.norm()).clamp(max=1))


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
    bound: float | None = None
    layer: str | None = "output"
    temperature: float = 1.0
    unit_features: bool = False
    remove_after: int | None = None
    weight_cap: float | None = None

    def criterion(self, loss: nn.Module, model: nn.Module, seed: int) -> nn.Module:
        """The task loss wrapped by `KnobbedFAM`."""
        return KnobbedFAM(loss, model, self, seed)


algorithms.register("fam-grokking", FamGrokking)
