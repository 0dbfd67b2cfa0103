"""Changes of the weights that leave the network's function as it is.

A measure of flatness that means something must not move under them. Relative flatness does not for
:func:`rescale_layer`, :func:`rescale_neurons` (seen from ``first``), :func:`rotate_features` and
:func:`shift_rows`; it does for :func:`rescale_features`, unless :func:`normalize_features` is applied first.

Functions that act between two layers change both in place. Functions that act on the features of one layer
return a replacement for it, because features cannot be changed in place: assign it where the layer was.
Each refuses layers between which it would change the function; :func:`preserving` checks a model on data.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from relflat.curvature.scales import std_of
from relflat.errors import ConfigError, DataError, GraphError, LayerError, LossError

Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Dense = (nn.Linear, *Convolution)

POOLING: tuple[type[nn.Module], ...] = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)

POSITIVELY_HOMOGENEOUS: tuple[type[nn.Module], ...] = (
    *(nn.Identity, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Flatten),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *POOLING,
)
"""Modules with ``f(c x) = c f(x)`` for every c > 0, channel by channel."""

SOFTMAX_HEADS: tuple[Any, ...] = (
    *(nn.CrossEntropyLoss, nn.Softmax, nn.LogSoftmax),
    *(F.cross_entropy, F.softmax, F.log_softmax, torch.softmax, torch.log_softmax),
)
"""Classes and functions to which adding one number to all logits makes no difference."""


# Between two layers


@torch.no_grad()
def rescale_layer(
    first: nn.Module, between: nn.Module | Sequence[nn.Module], second: nn.Module, factor: float
) -> None:
    """Divide the features of ``second`` by a factor and multiply its weight by it, in place.

    ``first`` (weight and bias) is divided by ``factor``; so are then the features ``phi`` that reach
    ``second``, and ``W phi = (W c) (phi / c)``. The bias of ``second`` stays.

    Args:
        first: Linear or convolution that makes the features.
        between: what lies between the two, in order; each must be positively homogeneous, as ReLU is.
        second: Linear or convolution that reads the features.
        factor: positive number c.

    Raises:
        LayerError: a layer of another class, or something between them that is not positively homogeneous.
        ConfigError: the factor is not positive and finite.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> x = torch.randn(5, 3)
        >>> before = net(x)
        >>> rescale_layer(net[0], net[1], net[2], factor=10.0)
        >>> torch.allclose(net(x), before, atol=1e-5)
        True
    """
    weight = _dense(first).weight
    rescale_neurons(first, between, second, weight.new_full((weight.shape[0],), 1 / _positive(factor)))


@torch.no_grad()
def rescale_neurons(
    first: nn.Module,
    between: nn.Module | Sequence[nn.Module],
    second: nn.Module,
    factors: Float[Tensor, " d"],
) -> None:
    """Multiply each neuron (or channel) of ``first`` by its own factor and undo it in ``second``, in place.

    Row s of the weight and entry s of the bias of ``first`` are multiplied by ``factors[s]``, the columns of
    ``second`` that read neuron s are divided by it. Seen from ``second`` it rescales its input features.

    Args:
        first: Linear or convolution with d outputs.
        between: what lies between the two, in order; each must be positively homogeneous, as ReLU is.
        second: Linear or convolution that reads the d neurons, or their positions flattened.
        factors: d positive numbers.

    Raises:
        LayerError: a layer of another class, sizes that do not fit, or something between the layers that is
            not positively homogeneous.
        ConfigError: a factor is not positive and finite, or there are not d of them.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> x = torch.randn(5, 3)
        >>> before = net(x)
        >>> rescale_neurons(net[0], net[1], net[2], torch.tensor([0.5, 8.0]))
        >>> torch.allclose(net(x), before, atol=1e-5)
        True
    """
    W, V = _dense(first).weight, _dense(second).weight
    _require_homogeneous(between, mixes_neurons=POOLING if isinstance(first, nn.Linear) else ())
    factors = _positive_vector(factors, W.shape[0], "factors", "neurons of the first layer").to(W)
    per_column = _positions_per_neuron(first, second)
    W.mul_(_along(factors, dim=0, like=W))
    if (bias := _dense(first).bias) is not None:
        bias.mul_(factors)
    V.div_(_along(torch.repeat_interleave(factors, per_column), dim=1, like=V))


@torch.no_grad()
def random_rescaling(
    model: nn.Sequential, *, low: float = 5.0, high: float = 25.0, generator: torch.Generator | None = None
) -> list[float]:
    """Rescale each pair of neighbouring layers by a random factor, in place (theory paper, section 5).

    Applies :func:`rescale_layer` to every Linear or convolution and the next one, unless what lies between
    them is not positively homogeneous.

    Args:
        model: the network, one module after the other.
        low: smallest factor, above 0.
        high: largest factor.
        generator: source of the factors, uniform on [low, high).

    Returns:
        The factors used, in the order of the layers.

    Raises:
        ConfigError: not ``0 < low <= high``.
        LayerError: no pair of layers in the model can be rescaled.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> len(random_rescaling(net, generator=torch.Generator().manual_seed(0)))
        2
    """
    if not 0 < low <= high < math.inf:
        raise ConfigError(f"low={low}, high={high}: choose 0 < low <= high, both finite")
    pairs = list(_rescalable_pairs(model))
    if not pairs:
        raise LayerError(
            "no two neighbouring Linear or convolution layers of the model have only positively homogeneous "
            "modules between them. Use rescale_layer on the pairs of a model that is not a plain Sequential."
        )
    factors: list[float] = (low + (high - low) * torch.rand(len(pairs), generator=generator)).tolist()
    for (first, between, second), factor in zip(pairs, factors, strict=True):
        rescale_layer(first, between, second, factor)
    return factors


# At the output


@torch.no_grad()
def shift_rows(layer: nn.Linear, vector: Float[Tensor, " m"], head: Any) -> None:
    """Add one vector to all rows of the output weight, in place: softmax does not see it.

    All logits of a sample grow by the same number ``<vector, phi>``, so the logits change and the
    probabilities and the cross-entropy do not.

    Args:
        layer: the output layer, with m features.
        vector: what to add to each row.
        head: what reads the logits: cross-entropy or a (log-)softmax over the classes.

    Raises:
        LossError: the head is not one of those and may see the shift.
        ConfigError: the vector does not have m entries.

    Example:
        >>> layer, phi = nn.Linear(3, 4), torch.randn(5, 3)
        >>> before = layer(phi).softmax(-1)
        >>> shift_rows(layer, torch.tensor([1.0, -2.0, 0.5]), nn.Softmax(dim=-1))
        >>> torch.allclose(layer(phi).softmax(-1), before, atol=1e-5)
        True
    """
    if head not in SOFTMAX_HEADS and type(head) not in SOFTMAX_HEADS:
        raise LossError(
            f"{head!r} is not known to ignore a shift of all logits. Pass nn.CrossEntropyLoss or a softmax, "
            "if that is what reads the logits; for other losses this is not a reparameterisation."
        )
    W = _linear(layer).weight
    if vector.shape != W.shape[1:]:
        raise ConfigError(
            f"vector has shape {tuple(vector.shape)}: it needs {W.shape[1]} entries, one a feature"
        )
    W.add_(vector)


# On the features of one layer


class Scale(nn.Module):
    """Multiplies each feature by a constant.

    Example:
        >>> Scale(torch.tensor([1.0, 0.5]))(torch.ones(1, 2))
        tensor([[1.0000, 0.5000]])
    """

    scale: Tensor

    def __init__(self, scale: Float[Tensor, " m"]) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, phi: Float[Tensor, "*n m"]) -> Float[Tensor, "*n m"]:
        """Return the scaled features."""
        return phi * self.scale


def rescale_features(layer: nn.Linear, scales: Float[Tensor, " m"]) -> nn.Sequential:
    """Return a replacement of the layer: feature t divided by ``scales[t]``, column t multiplied by it.

    Args:
        layer: Linear with m features; it is left as it is.
        scales: m positive numbers.

    Returns:
        ``Sequential(Scale, Linear)``; its last module is the layer in the rescaled features.

    Raises:
        ConfigError: a scale is not positive and finite, or there are not m of them.
        LayerError: the layer is not a Linear.

    Example:
        >>> layer, phi = nn.Linear(2, 3), torch.randn(5, 2)
        >>> torch.allclose(rescale_features(layer, torch.tensor([10.0, 0.1]))(phi), layer(phi), atol=1e-5)
        True
    """
    W = _linear(layer).weight.detach()
    scales = _positive_vector(scales, W.shape[1], "scales", "features of the layer").to(W)
    return nn.Sequential(Scale(1 / scales), _linear_like(layer, W * scales))


def normalize_features(layer: nn.Linear, features: Float[Tensor, "*n m"]) -> nn.Sequential:
    """Return a replacement of the layer whose features have standard deviation 1 over the data.

    The theory paper (section 5) normalises the features before it measures relative flatness, so that the
    value does not depend on the scale of single features. A feature that never varies (up to rounding) has no
    deviation to divide by: it and its column of the weight stay as they are, so that the function is the same on
    all inputs. ``relative_flatness(..., normalize_features=True)`` leaves such features out, before and after.

    Args:
        layer: Linear with m features; it is left as it is.
        features: its inputs over the data; all leading dimensions count as samples.

    Returns:
        ``Sequential(Scale, Linear)``; its last module is the layer to measure.

    Raises:
        DataError: there are fewer than two samples.
        LayerError: the layer is not a Linear.

    Example:
        >>> layer, phi = nn.Linear(2, 3), torch.randn(100, 2) * torch.tensor([10.0, 0.1])
        >>> normalized = normalize_features(layer, phi)
        >>> torch.allclose(normalized[0](phi).std(0, correction=0), torch.ones(2))
        True
    """
    phi = features.detach().reshape(-1, features.shape[-1])
    if len(phi) < 2:
        raise DataError(f"features hold {len(phi)} sample(s): a standard deviation needs at least two")
    std = std_of(phi.var(0, correction=0), phi.mean(0), phi.dtype)
    return rescale_features(layer, torch.where(std > 0, std, torch.ones_like(std)))


def rotate_features(layer: nn.Linear, rotation: Float[Tensor, "m m"]) -> nn.Sequential:
    """Return a replacement of the layer that reads rotated features ``Q phi``, with the weight ``W Q'``.

    Args:
        layer: Linear with m features; it is left as it is.
        rotation: orthogonal matrix Q.

    Returns:
        ``Sequential(Linear, Linear)``: the rotation, and the layer in the rotated features.

    Raises:
        ConfigError: Q is not an orthogonal (m, m) matrix.
        LayerError: the layer is not a Linear.

    Example:
        >>> layer, phi = nn.Linear(2, 3), torch.randn(5, 2)
        >>> quarter_turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        >>> torch.allclose(rotate_features(layer, quarter_turn)(phi), layer(phi), atol=1e-5)
        True
    """
    W = _linear(layer).weight.detach()
    m = W.shape[1]
    if rotation.shape != (m, m) or not _is_orthogonal(rotation):
        raise ConfigError(
            f"rotation of shape {tuple(rotation.shape)} is not an orthogonal ({m}, {m}) matrix. "
            "torch.linalg.qr(torch.randn(m, m)).Q gives one."
        )
    Q = rotation.to(W)
    turn = nn.Linear(m, m, bias=False, device=W.device, dtype=W.dtype)
    turn.weight = nn.Parameter(Q.clone())
    return nn.Sequential(turn, _linear_like(layer, W @ Q.T))


# Proof on data


@contextmanager
def preserving(
    model: nn.Module,
    *inputs: Any,
    output: Callable[[Any], Tensor] = lambda outputs: outputs,
    rtol: float = 1e-5,
) -> Iterator[None]:
    """Check on data that what is done inside ``with`` leaves the model's function as it was.

    Args:
        model: the network, in a deterministic mode.
        inputs: what to call it with.
        output: the part of its outputs to compare, for example the softmax of the logits.
        rtol: largest allowed change, relative to the largest output.

    Raises:
        GraphError: the outputs changed. Parameters and buffers of the model have been put back.

    Cost: two forward passes.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> with preserving(net, torch.randn(5, 3)):
        ...     rescale_layer(net[0], net[1], net[2], factor=10.0)
    """
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        before = output(model(*inputs))
    yield
    with torch.no_grad():
        change = (output(model(*inputs)) - before).abs().max().item()
    allowed = rtol * max(before.abs().max().item(), 1e-30)
    if not change <= allowed:
        model.load_state_dict(state)
        raise GraphError(
            f"the outputs changed by {change:.3g}, more than {allowed:.3g}: this was no reparameterisation, "
            "and the weights have been put back. Do the layers follow each other as declared, each used once?"
        )


# Checks and shapes


def _dense(layer: nn.Module) -> Any:
    if not isinstance(layer, Dense):
        raise LayerError(f"{layer} cannot be rescaled: choose a Linear, Conv1d, Conv2d or Conv3d")
    return layer


def _linear(layer: nn.Module) -> nn.Linear:
    if not isinstance(layer, nn.Linear):
        raise LayerError(f"{layer} is not a Linear layer: only a Linear's features can be changed")
    return layer


def _linear_like(layer: nn.Linear, W: Float[Tensor, "d m"]) -> nn.Linear:
    """Return a Linear with the given weight and a copy of the layer's bias."""
    d, m = W.shape
    new = nn.Linear(m, d, bias=layer.bias is not None, device=W.device, dtype=W.dtype)
    new.weight = nn.Parameter(W.clone())
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.detach().clone())
    return new


def _require_homogeneous(
    between: nn.Module | Iterable[nn.Module], mixes_neurons: tuple[type[nn.Module], ...]
) -> None:
    for module in _flat(between):
        if not isinstance(module, POSITIVELY_HOMOGENEOUS) or isinstance(module, mixes_neurons):
            raise LayerError(
                f"{module} lies between the layers and is not positively homogeneous neuron by neuron: "
                "rescaling would change the function. Choose layers with only ReLU-like activations or "
                "dropout between them, or pooling after a convolution."
            )


def _flat(between: nn.Module | Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Yield the modules in order, those of a Sequential one by one."""
    if isinstance(between, nn.Module) and not isinstance(between, nn.Sequential):
        yield between
    else:
        for module in between:
            yield from _flat(module)


def _rescalable_pairs(model: nn.Sequential) -> Iterator[tuple[nn.Module, list[nn.Module], nn.Module]]:
    """Yield each dense layer with the next one, if only positively homogeneous modules lie between."""
    first: nn.Module | None = None
    between: list[nn.Module] = []
    for module in _flat(model):
        if isinstance(module, Dense):
            if first is not None:
                yield first, between, module
            first, between = module, []
        elif isinstance(module, POSITIVELY_HOMOGENEOUS):
            between.append(module)
        else:
            first = None


def _positions_per_neuron(first: Any, second: Any) -> int:
    """Return how many neighbouring columns of ``second`` read one neuron of ``first``."""
    if first.weight is second.weight:
        raise LayerError(f"{first} and {second} share one weight: choose two layers of their own")
    if getattr(second, "groups", 1) != 1:
        raise LayerError(
            f"{second} has groups={second.groups}: its columns cannot be told apart, choose groups=1"
        )
    neurons, columns = first.weight.shape[0], second.weight.shape[1]
    flattened = isinstance(first, Convolution) and isinstance(second, nn.Linear)
    if columns == neurons or (flattened and columns % neurons == 0):
        return columns // neurons
    raise LayerError(
        f"{first} makes {neurons} outputs but {second} reads {columns}: pass layers that follow each other"
    )


def _along(factors: Float[Tensor, " k"], *, dim: int, like: Tensor) -> Tensor:
    """Return the factors shaped to multiply ``like`` along one dimension."""
    shape = [1] * like.ndim
    shape[dim] = -1
    return factors.reshape(shape)


def _positive(factor: float) -> float:
    if not 0 < factor < math.inf:
        raise ConfigError(
            f"factor={factor}: it must be positive and finite, for a negative one changes a ReLU"
        )
    return factor


def _positive_vector(values: Float[Tensor, " k"], k: int, name: str, what: str) -> Float[Tensor, " k"]:
    if values.shape != (k,):
        raise ConfigError(
            f"{name} has shape {tuple(values.shape)}: it needs {k} entries, one for each of the {what}"
        )
    if not bool(((values > 0) & (values < math.inf)).all()):
        raise ConfigError(f"{name}={values.tolist()}: all of them must be positive and finite")
    return values.detach()


def _is_orthogonal(Q: Float[Tensor, "m m"]) -> bool:
    identity = torch.eye(len(Q), dtype=Q.dtype, device=Q.device)
    return bool((Q @ Q.T - identity).abs().max() <= 1e3 * torch.finfo(Q.dtype).eps)
