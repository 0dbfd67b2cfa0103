"""What FAM's penalty would be in a network, before training with it: ``relflat.suggest``."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from relflat.capture.resolve import Layer
from relflat.errors import ConfigError
from relflat.measure.api import relative_flatness_by_layer
from relflat.measure.batches import Batch, ForwardFn
from relflat.options import checked
from relflat.plot.shown import ByLayer
from relflat.plot.tables import as_html, as_text, rows_of
from relflat.sizing import BOUND, EVERY, SIZE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = ("layer", "kappa", "± standard error", "share")
_USUAL = (0.01, 0.1)  # shares of the loss from which to start a search


@dataclass(frozen=True)
class Suggestion:
    """The penalty ``every * size / number of layers * sum of kappa`` of a step in a network, as it is now.

    Printed, it is a table of the layers and what follows from it; a notebook shows it too.

    Attributes:
        flats: kappa by layer, of the curvature that FAM takes.
        loss: the loss over the same data.
        size: strength times the number of layers.
        bound: largest share of a batch's loss that the penalty may have.
        every: steps from one penalty to the next, and its factor.
    """

    flats: ByLayer
    loss: float
    size: float
    bound: float
    every: int = EVERY

    @property
    def strength(self) -> float:
        """Lambda: what multiplies the sum of kappa over the layers."""
        return self.size / len(self.flats)

    @property
    def penalty(self) -> float:
        """``every * strength * sum of kappa``, before the bound."""
        return self.every * self.strength * self.flats.total

    @property
    def share(self) -> float:
        """The penalty over the loss, before the bound; infinite for a loss of 0."""
        return self.penalty / self.loss if self.loss > 0 else float("inf")

    @property
    def bounded(self) -> float:
        """The penalty as it would be added."""
        return min(self.penalty, self.bound * self.loss)

    def size_for(self, share: float) -> float:
        """The size at which the penalty is this share of the loss."""
        return self.size * share / self.share

    def plot(self, *, ax: "Axes | None" = None) -> "Axes":
        """Draw kappa by layer: :func:`relflat.plot.layers`."""
        return self.flats.plot(ax=ax)

    def _says(self) -> str:
        n, sums = len(self.flats), f"{self.loss:.4g}"
        lines = [
            f"size {self.size:g} over {n} layer{'s' if n > 1 else ''} is strength {self.strength:.3g}; every "
            f"{self.every} steps a penalty of {self.penalty:.3g}, {self.share:.2g} times the loss {sums}"
        ]
        if self.share > self.bound:
            lines.append(
                f"the bound holds it at {self.bound:g} of the loss, {self.bounded:.3g}, and sets it, not the size"
            )
        elif self.penalty > 0 and self.loss > 0:
            low, high = map(self.size_for, _USUAL)
            lines.append(
                f"sizes {low:.1g} to {high:.1g} give a penalty of {_USUAL[0]:g} to {_USUAL[1]:g} of the loss"
            )
        return ";\n".join(lines) + ".\nKappa rises and falls in training: this is of the weights as they are."

    def __str__(self) -> str:
        return as_text(_COLUMNS, [row[: len(_COLUMNS)] for row in rows_of(self.flats)], self._says())

    def _repr_html_(self) -> str:
        return as_html(_COLUMNS, [row[: len(_COLUMNS)] for row in rows_of(self.flats)], self._says())


@checked
def suggest(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    data: Iterable[Batch] | Batch,
    *,
    layer: Layer = "*",
    size: float = SIZE,
    bound: float = BOUND,
    every: int = EVERY,
    probes: int = 4,
    forward: ForwardFn | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> Suggestion:
    """Kappa by layer, each one's share, and what a size of FAM's penalty means in this network.

    The penalty is ``every * strength * (kappa_1 + ... + kappa_n)`` with ``strength = size / n``, at most ``bound`` of
    the batch's loss. Its share of the loss is what to look at: kappa has other scales in other networks. Where it is
    above the bound, the bound sets the penalty; where it is below a hundredth, hardly anything changes.

    Args:
        model: the network, best after some training without penalty: at random weights kappa is small.
        loss_fn: the criterion that FAM is to wrap.
        data: some batches of the training data, or one; more make the numbers sharper.
        layer: the layers that FAM is to regularise; by default all.
        size: strength times the number of layers.
        bound: largest share of the loss.
        every: steps from one penalty to the next.
        probes: random directions a batch, for layers without a closed form.
        forward: as for :func:`relflat.relative_flatness`, as are ``device`` and ``seed``.
        device: where to move batches.
        seed: of the probes.

    Raises:
        ConfigError: if size or bound is not positive; else as :func:`relflat.relative_flatness`.

    Cost: that of :func:`relflat.relative_flatness_by_layer` with ``curvature="ggn"``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,))
        >>> found = suggest(model, nn.CrossEntropyLoss(), (x, y))
        >>> found.strength
        0.004
        >>> 0 < found.share < found.bound
        True
    """
    for name, value in (("size", size), ("bound", bound)):
        if not value > 0:
            raise ConfigError(f"{name}={value}: a positive number is needed")
    flats = relative_flatness_by_layer(
        model, loss_fn, data, layer=layer, curvature="ggn", probes=probes, forward=forward, device=device, seed=seed
    )
    return Suggestion(flats, next(iter(flats.values())).loss, size, bound, every)
