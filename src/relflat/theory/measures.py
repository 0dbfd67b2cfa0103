"""``relflat.measures``: kappa beside the other measures of flatness, one table for a layer and its network."""

import math
from collections.abc import Callable, Iterable, Mapping
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
from relflat.theory.spectrum import Estimate, layer_spectrum

RADII: dict[Ball, float] = {"sphere": 0.05, "adaptive": 0.5, "box": 1e-3}
"""Of SAM, ASAM and epsilon-sharpness: those of their papers."""
_COLUMNS = ("measure", "value", "± error", "method")
_OF_NETWORK = ("SAM sharpness", "adaptive sharpness", "epsilon-sharpness, %")


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
    steps: int = 5,
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
    :func:`relflat.relative_flatness`; ``draws`` and ``max_products`` are starts and products of Lanczos; ``steps``
    are those of the ascent; ``seed`` is of the random vectors.

    Returns:
        An :class:`relflat.Estimate` for each: the error is a standard error, for eigenvalues a bound, and nan for
        what is known from below. Cost: about ``draws * max_products + 3 steps`` forward and backward passes, and for
        the largest eigenvalues some dozens for each output of the layer.

    Raises:
        ConfigError: if ``steps`` is below 1.
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
    spectrum = layer_spectrum(model, loss_fn, data, draws=draws, max_products=max_products, **given)
    known = not math.isnan(flat.trace)
    trace = Estimate(flat.trace, flat.trace_stderr, flat.method) if known else spectrum.trace
    square = flat.weight_norm**2
    found = {
        "kappa": Estimate(flat.value, flat.stderr, flat.method),
        "kappa, largest eigenvalues": max_eigenvalue_flatness(model, loss_fn, data, **given),
        "Tr H": trace,
        "||W||² Tr H": Estimate(square * trace.value, square * trace.stderr, trace.method),
        "lambda_max(H)": spectrum.top,
        "||W||": Estimate(flat.weight_norm, 0.0, "norm"),
    }
    with measuring(model, loss_fn, data, layer, Options("hessian", measuring=True), forward, device, seed) as of:
        parameters = [p for p in model.parameters() if p.requires_grad]
        for name, (ball, radius) in zip(_OF_NETWORK, RADII.items(), strict=True):
            rise = rise_within(ball, radius, parameters, lambda: _loss_and_gradients(of, parameters), steps)
            value = 100 * rise / (1 + flat.loss) if ball == "box" else rise
            found[name] = Estimate(value, math.nan, f"ascent({steps} steps), from below")
    return Measures(found, flat)


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
