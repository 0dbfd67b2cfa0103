"""One update of the parameters, in the three ways that algorithms make it.

A step takes one batch and returns what it minimised. BatchNorm statistics move once a step, whatever the number of
forward passes.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from relflat import FAM
from relflat.lab.data.arrays import Inputs
from relflat.lab.tasks.metrics import run
from relflat.theory.sharpness import kept

if TYPE_CHECKING:
    from accelerate import Accelerator


class Losses(NamedTuple):
    """Task loss plus penalty, and the latter alone: nan where the forward pass was perturbed, so it is not known."""

    total: Tensor
    penalty: float


@dataclass
class Learner:
    """What a step works with; the algorithm has wrapped the criterion and the optimiser."""

    accelerator: "Accelerator"
    model: nn.Module
    criterion: nn.Module
    optimizer: Optimizer

    def backward(self, inputs: Inputs, targets: Tensor) -> Losses:
        """Fresh gradients of the criterion on a batch, and what its values were."""
        self.optimizer.zero_grad()
        loss: Tensor = self.criterion(run(self.model, inputs), targets)
        self.accelerator.backward(loss)
        fam = self.criterion
        return Losses(loss.detach(), float(fam.last["penalty"]) if isinstance(fam, FAM) else 0.0)


def plain_step(learner: Learner, inputs: Inputs, targets: Tensor) -> Losses:
    """One gradient step on the criterion, which is the task loss and what the algorithm adds to it."""
    losses = learner.backward(inputs, targets)
    learner.optimizer.step()
    return losses


def sam_step(learner: Learner, inputs: Inputs, targets: Tensor) -> Losses:
    """A step uphill, then the gradient from there applied to the old weights; two passes.

    FAM as the criterion draws the same probes in both and counts them as one step.
    """
    step = get_counter(learner.criterion)
    losses = learner.backward(inputs, targets)

    def uphill() -> float:
        set_counter(learner.criterion, step)
        with kept(learner.model.buffers()):  # running statistics and their counters move in the first pass alone
            return float(learner.backward(inputs, targets).total)

    learner.optimizer.step(uphill)
    return losses


def looksam_step(learner: Learner, inputs: Inputs, targets: Tensor) -> Losses:
    """SAM's two passes when it is time for them, else one pass and the direction kept from then."""
    inner: Any = getattr(learner.optimizer, "optimizer", learner.optimizer)
    done: int = inner.param_groups[0].get("looksam_step", 0)  # part of the optimiser's state
    if done % inner.k == 0:
        return sam_step(learner, inputs, targets)
    losses = []

    def here() -> float:
        losses.append(learner.backward(inputs, targets))
        return 0.0

    learner.optimizer.step(here)
    return losses[0]


def get_counter(criterion: nn.Module) -> int:
    """The step number that, with its seed, determines FAM's probes; 0 for criteria without one."""
    return criterion.step if isinstance(criterion, FAM) else 0


def set_counter(criterion: nn.Module, step: int) -> None:
    """Put back what ``get_counter`` returned."""
    if isinstance(criterion, FAM):
        criterion.step = step
