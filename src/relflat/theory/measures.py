"""``relflat.measures``: kappa beside the other measures of flatness, one table for a layer and its network."""

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from relflat.capture.resolve import Layer
from relflat.errors import ConfigError
from relflat.measure.api import relative_flatness
from relflat.measure.batches import Batch, ForwardFn
from relflat.measure.sweep import Measurement, measuring
from relflat.options import Options, checked
from relflat.plot.tables import about, as_html, as_text
from relflat.result import Flatness
from relflat.theory.relatives import max_eigenvalue_flatness
from relflat.theory.sharpness import Ball, rise_within
from relflat.theory.spectrum import Estimate, Spectrum, layer_spectrum

SHARPNESS: dict[str, tuple[Ball, float]] = {
    "SAM sharpness": ("sphere", 0.05),
    "adaptive sharpness": ("adaptive", 0.5),
    "epsilon-sharpness, %": ("box", 1e-3),
}
"""By name, the ball and its radius: those of their papers."""
_COLUMNS = ("measure", "value", "± error", "method")


class Measures(dict[str, Estimate]):
    """Measures by name, each with its error: a dictionary that prints and renders as a table.

    Attributes:
        flat: kappa of the layer, with what it was measured on.
    """

    def __init__(self, found: Mapping[str, Estimate], flat: Flatness) -> None:
        super().__init__(found)
        self.flat = flat

    def _rows(self) -> list[tuple[str, ...]]:
        return [(name, f"{e.value:.5g}", _error(e), e.method) for name, e in self.items()]

    def __str__(self) -> str:
        return as_text(_COLUMNS, self._rows(), self._about())

    def _repr_html_(self) -> str:
        return as_html(_COLUMNS, self._rows(), self._about())

    def _about(self) -> str:
        layer = self.flat.layer or "(the model)"
        return f"of layer {layer}, sharpness of all parameters; {about({layer: self.flat})}"


def _error(of: Estimate) -> str:
    return "-" if math.isnan(of.stderr) else f"{of.stderr:.2g}" if of.stderr else "exact"


@checked
def measures(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    data: Iterable[Batch] | Batch,
    *,
    layer: Layer = "output",
    draws: int = 4,
    max_products: int = 30,
    rtol: float = 1e-4,
    steps: int = 5,
    only: Collection[str] | None = None,
    forward: ForwardFn | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> Measures:
    """Kappa of a layer and what else is called flatness, of the same loss over the same data.

    Of the layer: ``kappa``, ``kappa, largest eigenvalues`` (:func:`relflat.max_eigenvalue_flatness`), ``Tr H``,
    ``||W||^2 Tr H``, ``lambda_max(H)`` by Lanczos (:func:`relflat.landscape.layer_spectrum`) and ``||W||``. Of all
    trained parameters, by gradient ascent and so from below: SAM sharpness (Foret et al. 2021, radius .05), adaptive
    sharpness (Kwon et al. 2021, radius .5) and epsilon-sharpness (Keskar et al. 2017, full space, epsilon .001, in
    percent of ``1 + L``). Where features are divided by a factor and the weight is multiplied by it, kappa, its
    largest eigenvalues, ``||W||^2 Tr H`` and adaptive sharpness stay as they are, the others do not.

    ``model``, ``loss_fn``, ``data``, ``layer``, ``forward`` and ``device`` are those of
    :func:`relflat.relative_flatness`; ``draws`` and ``max_products`` are starts and products of Lanczos,
    ``rtol`` is how exact the largest eigenvalues in kappa's place are; ``steps`` are those of the ascent; ``seed`` is
    of the random vectors. ``only`` names the measures that are wanted, and what others cost is spared.

    Returns:
        An :class:`relflat.Estimate` for each: the error is a standard error, for eigenvalues a bound, and nan for
        what is known from below. Cost: about ``draws * max_products + 3 steps`` forward and backward passes, and for
        the largest eigenvalues some dozens for each output of the layer.

    Raises:
        ConfigError: if ``steps`` is below 1, or ``only`` names what is no measure.
        LayerError: if the layer's weight is frozen.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,))
        >>> found = measures(model, nn.CrossEntropyLoss(), (x, y))
        >>> found["SAM sharpness"].value > 0
        True
    """
    if steps < 1:
        raise ConfigError(f"steps={steps}: one step of ascent at least is needed")
    given: dict[str, Any] = {"layer": layer, "forward": forward, "device": device, "seed": seed}
    flat = relative_flatness(model, loss_fn, data, **given)
    square = flat.weight_norm**2

    @functools.cache
    def spectrum() -> Spectrum:
        return layer_spectrum(model, loss_fn, data, draws=draws, max_products=max_products, **given)

    def trace(factor: float = 1.0) -> Estimate:
        found = spectrum().trace if math.isnan(flat.trace) else Estimate(flat.trace, flat.trace_stderr, flat.method)
        return Estimate(factor * found.value, factor * found.stderr, found.method)

    def sharpness(ball: Ball, radius: float) -> Estimate:
        options = Options("hessian", measuring=True)
        with measuring(model, loss_fn, data, layer, options, forward, device, seed) as of:
            return _sharpness(of, ball, radius, steps, flat.loss)

    ways: dict[str, Callable[[], Estimate]] = {
        "kappa": lambda: Estimate(flat.value, flat.stderr, flat.method),
        "kappa, largest eigenvalues": lambda: max_eigenvalue_flatness(model, loss_fn, data, rtol=rtol, **given),
        "Tr H": trace,
        "||W||² Tr H": lambda: trace(square),
        "lambda_max(H)": lambda: spectrum().top,
        "||W||": lambda: Estimate(flat.weight_norm, 0.0, "norm"),
        **{name: functools.partial(sharpness, *ball) for name, ball in SHARPNESS.items()},
    }
    wanted = _names(ways, only)
    return Measures({name: of() for name, of in ways.items() if name in wanted}, flat)


def _names(known: Collection[str], only: Collection[str] | None) -> Collection[str]:
    """The measures that are wanted."""
    if unknown := sorted({*(only or ())} - {*known}):
        raise ConfigError(f"only={unknown}: no such measures; choose among {list(known)}")
    return known if only is None else only


def _sharpness(of: Measurement, ball: Ball, radius: float, steps: int, loss: float) -> Estimate:
    """By how much the loss rises within a ball; in a box in percent of one and the loss."""
    parameters = [p for p in of.model.parameters() if p.requires_grad]
    rise = rise_within(ball, radius, parameters, lambda: _loss_and_gradients(of, parameters), steps)
    value = 100 * rise / (1 + loss) if ball == "box" else rise
    return Estimate(value, math.nan, f"ascent({steps} steps), from below")


def _loss_and_gradients(of: Measurement, parameters: list[nn.Parameter]) -> tuple[float, list[Tensor]]:
    """Of the loss over all of the data."""
    total, divisor, gradients = 0.0, 0.0, [torch.zeros_like(p) for p in parameters]
    for scene, (factor, part) in of.scenes():
        loss = factor * scene.loss.sum()
        total, divisor = total + float(loss.detach()), divisor + part
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        for kept, one in zip(gradients, found, strict=True):
            kept += 0.0 if one is None else one
    return total / (divisor or 1.0), [g / (divisor or 1.0) for g in gradients]
