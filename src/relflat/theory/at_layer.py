"""A model as a function of one layer's weight matrix, in float64: what :mod:`relflat.theory.definitions` takes."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from relflat.errors import LayerError
from relflat.options import checked

LossOfWeight = Callable[[Tensor], Tensor]
"""The loss as a function of one weight matrix: Float[Tensor, "d m"] -> Float[Tensor, ""]."""

OutputsOfWeight = Callable[[Tensor], Tensor]
"""The network's outputs as a function of one weight matrix: Float[Tensor, "d m"] -> Float[Tensor, "..."]."""


@checked
def at_layer(
    model: nn.Module, loss_fn: Callable[..., Tensor], inputs: Any, targets: Any, layer: str
) -> tuple[LossOfWeight, Float[Tensor, "d m"]]:
    """Return the loss as a function of one layer's weight, and that weight: what the definitions take.

    Args:
        model: any module whose forward pass is deterministic in its present mode.
        loss_fn: maps ``(model(inputs), targets)`` to a scalar.
        inputs: what the model is called with.
        targets: what ``loss_fn`` is called with, beside the outputs.
        layer: name of a module (its ``weight`` is meant) or of a parameter. It may be used several times in
            one forward pass, or be tied: the definition only sees the parameter.

    Returns:
        ``(loss, W)``: ``loss`` takes a (d, m) matrix, and ``W`` is the present one. A weight of more than two
        dimensions is flattened to (out, everything else), a convolution's to (out, in * k * k). Both are
        float64 and connected to the model's own parameters, whatever their dtype.

    Raises:
        LayerError: the model has no such parameter.

    Example:
        >>> import torch
        >>> model = nn.Linear(3, 2)
        >>> loss, W = at_layer(model, nn.MSELoss(), torch.ones(4, 3), torch.zeros(4, 2), "weight")
        >>> W.shape, W.dtype, loss(W).shape
        (torch.Size([2, 3]), torch.float64, torch.Size([]))
    """
    outputs, W = outputs_at_layer(model, inputs, layer)

    def loss(V: Float[Tensor, "d m"]) -> Float[Tensor, ""]:
        return _in_float64(loss_fn)(outputs(V), _double(targets))

    return loss, W


@checked
def outputs_at_layer(model: nn.Module, inputs: Any, layer: str) -> tuple[OutputsOfWeight, Float[Tensor, "d m"]]:
    """Return the model's outputs as a function of one layer's weight, and that weight.

    Arguments and errors are those of :func:`at_layer`.

    Example:
        >>> import torch
        >>> outputs, W = outputs_at_layer(nn.Linear(3, 2), torch.ones(4, 3), "weight")
        >>> outputs(W).shape
        torch.Size([4, 2])
    """
    name, parameter = _find_parameter(model, layer)

    def outputs(V: Float[Tensor, "d m"]) -> Tensor:
        # The one difference between V and the present weight: what the model finds under the parameter's name.
        state = _double_state(model) | {name: V.reshape(parameter.shape)}
        return functional_call(model, state, (_double(inputs),))

    return outputs, parameter.double().reshape(parameter.shape[0], -1)


def _find_parameter(model: nn.Module, layer: str) -> tuple[str, Tensor]:
    """Return the first name of the parameter that ``layer`` means, and the parameter."""
    if not isinstance(layer, str):
        raise LayerError(f"layer of {type(layer).__name__}: the name of a module or parameter is needed")
    aliases = dict(model.named_parameters(remove_duplicate=False))
    for name in (layer, f"{layer}.weight"):
        if name in aliases:  # a tied parameter has several names, and functional_call wants the first
            return next((n, p) for n, p in model.named_parameters() if p is aliases[name])
    raise LayerError(
        f"the model has no parameter {layer!r} or {layer + '.weight'!r}; "
        f"it has: {', '.join(aliases) or 'none'}. "
        "Pass one of these names, or the name of a module that has a weight."
    )


def _double_state(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers in float64, still connected to the originals."""
    return {name: _double(t) for name, t in [*module.named_parameters(), *module.named_buffers()]}


def _double(value: Any) -> Any:
    """Return a floating-point tensor in float64, anything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _in_float64(loss_fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the loss with its own tensors (class weights) in float64."""
    if not isinstance(loss_fn, nn.Module):
        return loss_fn
    return lambda *args: functional_call(loss_fn, _double_state(loss_fn), args)
