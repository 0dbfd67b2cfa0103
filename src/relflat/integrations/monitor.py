"""``Monitor``: relative flatness while a network trains, in a plain loop and behind the callbacks of frameworks."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from relflat.capture.resolve import Layer
from relflat.errors import ConfigError, DataError
from relflat.measure.api import relative_flatness_by_layer
from relflat.measure.batches import Batch
from relflat.options import check
from relflat.plot.shown import ByLayer
from relflat.result import Flatness

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Log = Callable[[dict[str, float], int], Any]


class Measured(NamedTuple):
    """What was found at a step."""

    step: int
    flats: ByLayer


class Monitor:
    """Measures layers every so many steps of a loop, keeps what it finds, draws it and hands it to a logger.

    Args:
        model: the network.
        loss_fn: ``loss_fn(outputs, targets)``.
        data: batches to measure on, the same each time: a part of the training data, as a list or loader.
        layer: as for :func:`relflat.relative_flatness_by_layer`; by default all.
        every: steps (or epochs: calls of the monitor) from one measurement to the next.
        log: called with what was measured, ``{name: number}``, and the step: ``run.log`` of Weights & Biases as
            ``lambda found, step: run.log(found, step=step)``.
        **options: of :func:`relflat.relative_flatness_by_layer`, such as ``curvature`` and ``probes``.

    Attributes:
        history: pairs ``(step, flats)``, in order.

    Raises:
        ConfigError: for ``every`` below 1.

    Cost: none between measurements; each is one of :func:`relflat.relative_flatness_by_layer`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,))
        >>> monitor = Monitor(model, nn.CrossEntropyLoss(), (x, y), every=10)
        >>> for step in range(21):
        ...     found = monitor()
        >>> [step for step, _ in monitor.history]
        [0, 10, 20]
    """

    unit = "step"  # of what it counts, for pictures

    def __init__(
        self,
        model: nn.Module | None,
        loss_fn: Callable[..., Any] | None,
        data: Iterable[Batch] | Batch | None,
        layer: Layer = "*",
        *,
        every: int = 1,
        log: Log | None = None,
        **options: Any,
    ) -> None:
        check(every=every, layer=layer)
        self.model, self.loss_fn, self.data, self.layer = model, loss_fn, data, layer
        self.every, self.log, self.options = every, log, options
        self.history: list[Measured] = []
        self._calls = 0

    def __repr__(self) -> str:
        last = (
            f", last at {self.unit} {self.history[-1].step}: {self.history[-1].flats.total:.4g}"
            if self.history
            else ""
        )
        return f"{type(self).__name__}(every={self.every}, measured {len(self.history)} times{last})"

    def __call__(self, step: int | None = None) -> ByLayer | None:
        """Measure if this step is due, and log it.

        Args:
            step: its number; by default how often the monitor was called before.

        Returns:
            What was found; None if nothing was due.
        """
        step = self._calls if step is None else step
        self._calls = step + 1
        if not self.due(step):
            return None
        if self.model is None:
            raise ConfigError("the monitor has no model; give it one")
        found = self.measure(self.model, self.loss_fn, self.data, "there are none", step)
        if self.log is not None:
            self.log(metrics(found), step)
        return found

    def due(self, step: int) -> bool:
        """Whether to measure at this step."""
        return step % self.every == 0

    def measure(self, model: nn.Module, loss_fn: Any, data: Any, lacking: str, step: int) -> ByLayer:
        """Measure now, and keep it as of this step.

        Raises:
            DataError: if there are no data; ``lacking`` says what has none.
        """
        if data is None:
            raise DataError(f"{type(self).__name__}: {lacking}; give data=")
        found = relative_flatness_by_layer(model, loss_fn, data, layer=self.layer, **self.options)
        self.history.append(Measured(step, found))
        return found

    def plot(self, *, number: str = "value", ax: "Axes | None" = None) -> "Axes":
        """Draw what was measured so far: :func:`relflat.plot.history`."""
        from relflat.plot import history

        return history(self, number=number, ax=ax)


def metrics(by_layer: Mapping[str, Flatness]) -> dict[str, float]:
    """Measured values by name, kappa never alone: with its error, and the loss and confidence it depends on."""
    found: dict[str, float] = {}
    for layer, flat in by_layer.items():
        found[f"flatness/{layer}"] = flat.value
        found[f"flatness/{layer}/weight_norm"] = flat.weight_norm
        if flat.stderr:
            found[f"flatness/{layer}/stderr"] = flat.stderr
        found["flatness/loss"] = flat.loss
        if flat.confidence is not None:
            found["flatness/confidence"] = flat.confidence
    return found
