"""Accelerate: FAM is an ordinary criterion there; this adds what checkpoints need."""

from collections.abc import Callable
from typing import Any

from torch import nn

from relflat.capture.resolve import Layer
from relflat.fam import FAM
from relflat.integrations.common import extra

with extra("accelerate"):
    from accelerate import Accelerator


class FAMStep:
    """The state of a FAM that a resumed run needs, as ``Accelerator.register_for_checkpointing`` wants it."""

    def __init__(self, criterion: FAM) -> None:
        self.criterion = criterion

    def state_dict(self) -> dict[str, int]:
        """The number of calls so far."""
        return {"step": self.criterion.step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore it."""
        self.criterion.step = state_dict["step"]


def prepare_fam(
    accelerator: Accelerator,
    loss_fn: Callable[..., Any],
    model: nn.Module,
    layer: Layer | None = None,
    **options: Any,
) -> FAM:
    """Return FAM for a model, prepared or not, whose step is saved by ``accelerator.save_state``.

    Args:
        accelerator: yours.
        loss_fn: as for :class:`relflat.FAM`.
        model: the network, before or after ``accelerator.prepare``.
        layer: as for :class:`relflat.FAM`.
        **options: of :class:`relflat.FAM`.

    Returns:
        The criterion: ``accelerator.backward(criterion(model(x), y))``.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> criterion = prepare_fam(Accelerator(cpu=True), nn.CrossEntropyLoss(), model)
    """
    network = accelerator.unwrap_model(model, keep_torch_compile=False)
    criterion = FAM(loss_fn, network, layer, **options)
    accelerator.register_for_checkpointing(FAMStep(criterion))
    return criterion
