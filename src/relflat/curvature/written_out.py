"""Derivatives of operations that PyTorch cannot differentiate twice, or not rightly, from elementary operations.

To add one: a class with ``composed``, the gradient G in an input as a function of (gy, x, w), or a twin, the
operation itself from elementary operations, and a line in ``WRITTEN_OUT``.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from relflat.capture.graph import signed

Gradients = tuple[Tensor | None, ...]


def gradients(
    value: Tensor, given: Sequence[Tensor | None], needs: Sequence[bool], v: Tensor, further: bool
) -> Gradients:
    """Those of ``<v, value>`` in what is given and needed, None elsewhere."""
    wanted = [t for t, need in zip(given, needs, strict=True) if need and t is not None]
    if not value.requires_grad:  # piecewise linear, along a constant
        return (None,) * len(given)
    pulled = iter(torch.autograd.grad(value, wanted, v, create_graph=further, allow_unused=True))
    return tuple(next(pulled) if need and t is not None else None for t, need in zip(given, needs, strict=True))


class Mended(ABC):
    """An operation as its node saved it; G is the gradient in its input x, a function of (gy, x, w)."""

    x: Tensor
    weight: Tensor | None = None

    def __init__(self, node: Any) -> None:
        self.x, self.node = node._saved_self, node

    @abstractmethod
    def composed(self, grad: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
        """G from elementary operations, differentiable as often as one likes."""

    def once(self, v: Tensor, found: Tensor, given: Sequence[Any], needs: Sequence[bool]) -> Gradients:
        """The derivatives of ``<v, G>`` in what is given and needed, without a graph of their own; ``found`` is G."""
        with torch.enable_grad():
            alone: list[Any] = [None if t is None else t.detach().requires_grad_(t.requires_grad) for t in given]
            return gradients(self.composed(*alone), alone, needs, v, False)


class _LogCumSumExp(Mended):
    """``G_i = sum_{j >= i} gy_j exp(x_i - y_j)``, which PyTorch takes through the logarithm of gy: no number at 0."""

    def composed(self, grad: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
        dim = signed(self.node._saved_dim)
        x, grad = x.movedim(dim, -1), grad.movedim(dim, -1)
        later = torch.ones(x.shape[-1], x.shape[-1], dtype=torch.bool, device=x.device).triu(1)
        shares = x.unsqueeze(-2).masked_fill(later, -torch.inf).softmax(-1)  # [j, i]: exp(x_i - y_j)
        return (grad.unsqueeze(-2) @ shares).squeeze(-2).movedim(-1, dim)


class _Hardsigmoid(Mended):
    """``G = gy / 6`` between -3 and 3; PyTorch's has no derivative."""

    def composed(self, grad: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
        return grad * (x.abs() < 3) / 6


class _Twin(Mended):
    """``G`` as the gradient of another function with the same values, in x."""

    @abstractmethod
    def value(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """The operation; ``weight`` is its other input."""

    def composed(self, grad: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            (found,) = torch.autograd.grad(self.value(x, weight), x, grad, create_graph=True)
        return found


class _Cdist(_Twin):
    """Distances between rows, by one of the two inputs; all differences are written out, distances times features."""

    def __init__(self, node: Any, other: bool = False) -> None:
        pair = node._saved_x1, node._saved_x2
        (self.x, self.weight), self.p, self.other = pair[::-1] if other else pair, node._saved_p, other

    def value(self, x: Tensor, weight: Tensor | None) -> Tensor:
        assert weight is not None
        found = _length(x.unsqueeze(-2) - weight.unsqueeze(-3), self.p)
        return found.mT if self.other else found


class _Pdist(_Twin):
    """Distances between the rows of one matrix."""

    def value(self, x: Tensor, weight: Tensor | None) -> Tensor:
        i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
        return _length(x[i] - x[j], self.node._saved_p)


def _length(x: Tensor, p: float) -> Tensor:
    """p-norms of rows; constant where a row is 0, as PyTorch has it."""
    none = (x == 0).all(-1, keepdim=True)
    return torch.linalg.vector_norm(torch.where(none, 1.0, x), p, -1) * ~none.squeeze(-1)


class _EmbeddingBag(Mended):
    """``G`` has gy in the rows that were looked up: linear, so that its derivative is a lookup."""

    def __init__(self, node: Any) -> None:
        self.x, self.node = node._saved_indices, node

    def composed(self, grad: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
        node, table = self.node, grad.new_zeros(self.node._saved_weight_sym_argsize_0, grad.shape[1])
        if node._saved_mode == 2:  # max: a row for each bag and column
            return table.scatter_add(0, node._saved_result3, grad * (node._saved_result2 > 0)[:, None])
        bag = torch.searchsorted(node._saved_offsets, torch.arange(len(x), device=x.device), right=True) - 1
        counts = (x != node._saved_padding_idx).to(grad.dtype)
        if node._saved_per_sample_weights is not None:
            counts = counts * node._saved_per_sample_weights
        elif node._saved_mode == 1:
            counts = counts / grad.new_zeros(len(grad)).index_add(0, bag, counts)[bag].clamp_min(1)
        return table.index_add(0, x, grad[bag] * counts[:, None])


WRITTEN_OUT: dict[str, Sequence[Callable[[Any], Mended]]] = {
    "LogcumsumexpBackward0": (_LogCumSumExp,),
    "HardsigmoidBackward0": (_Hardsigmoid,),
    "CdistBackward0": (_Cdist, functools.partial(_Cdist, other=True)),
    "PdistBackward0": (_Pdist,),
    "EmbeddingBagBackward0": (_EmbeddingBag,),
}
