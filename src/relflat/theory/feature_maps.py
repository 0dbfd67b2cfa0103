"""Changes of one layer that keep the function: of its features, and of the rows of a softmax output layer.

``W phi = (W A^-1) (A phi)`` for invertible A. Kappa does not move for orthogonal A (:func:`rotate_features`); for
diagonal A (:func:`rescale_features`) it does, unless :func:`normalize_features` is applied first.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from relflat.curvature.scales import std_of
from relflat.errors import ConfigError, DataError, LayerError, LossError
from relflat.options import checked
from relflat.theory.rescalings import positive_vector

SOFTMAX_HEADS: tuple[Any, ...] = (
    *(nn.CrossEntropyLoss, nn.Softmax, nn.LogSoftmax),
    *(F.cross_entropy, F.softmax, F.log_softmax, torch.softmax, torch.log_softmax),
)
"""Classes and functions to which adding one number to all logits makes no difference."""


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


@checked
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
    scales = positive_vector(scales, W.shape[1], "scales", "features of the layer").to(W)
    return nn.Sequential(Scale(1 / scales), _linear_like(layer, W * scales))  # W phi = (W S) (S^-1 phi)


@checked
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


@checked
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
    return nn.Sequential(turn, _linear_like(layer, W @ Q.T))  # W phi = (W Q') (Q phi)


@checked
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
        raise ConfigError(f"vector has shape {tuple(vector.shape)}: it needs {W.shape[1]} entries, one a feature")
    W.add_(vector)  # (w_s + a) . phi = w_s . phi + a . phi, the same a . phi for every class s


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


def _is_orthogonal(Q: Float[Tensor, "m m"]) -> bool:
    identity = torch.eye(len(Q), dtype=Q.dtype, device=Q.device)
    return bool((Q @ Q.T - identity).abs().max() <= 1e3 * torch.finfo(Q.dtype).eps)
