"""Rescalings between two layers: features divided by a factor, the weight that reads them multiplied by it.

For c > 0 and positively homogeneous f, ``W f(V x) = (W c) f(V x / c)``; likewise for one factor a neuron. Kappa of
the second layer stays as it is under one factor for all neurons, its adaptive form (I9) under one for each, too.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from relflat.errors import ConfigError, LayerError
from relflat.options import checked

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


@checked
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
    rescale_neurons(first, between, second, weight.new_full((weight.shape[0],), 1 / factor))


@checked
@torch.no_grad()
def rescale_neurons(
    first: nn.Module, between: nn.Module | Sequence[nn.Module], second: nn.Module, factors: Float[Tensor, " d"]
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
    factors = positive_vector(factors, W.shape[0], "factors", "neurons of the first layer").to(W)
    per_column = _positions_per_neuron(first, second)
    # With C = diag(factors): V f(W x + b) = (V C^-1) f(C W x + C b), as f(C y) = C f(y) neuron by neuron.
    W.mul_(_along(factors, dim=0, like=W))
    if (bias := _dense(first).bias) is not None:
        bias.mul_(factors)
    V.div_(_along(torch.repeat_interleave(factors, per_column), dim=1, like=V))


@checked
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
    if not low <= high:
        raise ConfigError(f"low={low}, high={high}: choose 0 < low <= high, both finite")
    pairs = list(_rescalable_pairs(model))
    if not pairs:
        raise LayerError(
            "no two neighbouring Linear or convolution layers of the model have only positively homogeneous "
            "modules between them. Use rescale_layer on the pairs of a model that is not a plain Sequential."
        )
    factors: list[float] = (
        low
        + (high - low) * torch.rand(len(pairs), generator=generator, device=generator.device if generator else None)
    ).tolist()
    for (first, between, second), factor in zip(pairs, factors, strict=True):
        rescale_layer(first, between, second, factor)
    return factors


def _dense(layer: nn.Module) -> Any:
    if not isinstance(layer, Dense):
        raise LayerError(f"{layer} cannot be rescaled: choose a Linear, Conv1d, Conv2d or Conv3d")
    return layer


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
        raise LayerError(f"{second} has groups={second.groups}: its columns cannot be told apart, choose groups=1")
    neurons, columns = first.weight.shape[0], second.weight.shape[1]
    # Flattening a convolution's outputs puts the positions of one channel next to each other.
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


def positive_vector(values: Float[Tensor, " k"], k: int, name: str, what: str) -> Float[Tensor, " k"]:
    """Return the values, detached, or refuse what is not ``k`` positive and finite numbers."""
    if values.shape != (k,):
        raise ConfigError(f"{name} has shape {tuple(values.shape)}: it needs {k} entries, one for each of the {what}")
    if not bool(((values > 0) & (values < math.inf)).all()):
        raise ConfigError(f"{name}={values.tolist()}: all of them must be positive and finite")
    return values.detach()
