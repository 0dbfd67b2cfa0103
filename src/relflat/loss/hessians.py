"""Hessians of losses with respect to one row of logits, in the forms that kappa needs."""

import copy
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class LogitHessian(Protocol):
    """Rows ``A_p = d2 L / dz_p2``, the weights and the reduction of the loss included."""

    def diagonal(self, weight: Float[Tensor, "d m"]) -> Float[Tensor, "p m"]:
        """The diagonal of ``W' A_p W``."""

    def total(self, weight: Float[Tensor, "d m"]) -> Float[Tensor, " p"]:
        """``Tr(W' A_p W)``."""

    def trace(self) -> Float[Tensor, " p"]:
        """``Tr A_p``."""

    def factor(self, eps: Float[Tensor, "p d"]) -> Float[Tensor, "p d"]:
        """``S_p eps_p`` with ``S_p S_p' = A_p``."""

    def product(self, v: Float[Tensor, "p d"]) -> Float[Tensor, "p d"]:
        """``A_p v_p``."""

    def times(self, constant: float) -> "LogitHessian":
        """``constant * A_p``, for a constant that is not negative."""


class SoftmaxHessian:
    """``A_p = mass_p (diag p - p p')``: cross-entropy (I1).

    Everything is written in ``q = p - e_k``, k the most likely class, whose entries are of the size of what
    is missing to certainty. So the variance keeps its relative accuracy when ``p`` is nearly one-hot, where
    ``E|w|^2 - |E w|^2`` would lose all of it.
    """

    def __init__(self, logits: Float[Tensor, "p d"], mass: Float[Tensor, " p"]) -> None:
        self.mass, self.log_p = mass, F.log_softmax(logits, dim=-1)
        self.k = self.log_p.argmax(-1, keepdim=True)
        self.others = self.log_p.exp().scatter(-1, self.k, 0.0)
        self.missing = self.others.sum(-1)

    def _moments(self, weight: Float[Tensor, "d m"]) -> tuple[Tensor, Tensor, Tensor]:
        """``q``, W without its mean row (which kappa does not see, but rounding does), what ``q W^2`` exceeds by."""
        q = self.others.scatter(-1, self.k, -self.missing[:, None])
        w = weight - weight.detach().mean(0)
        mean = q @ w
        return q, w, mean * (2 * w[self.k[:, 0]] + mean)

    def diagonal(self, weight: Float[Tensor, "d m"]) -> Float[Tensor, "p m"]:
        """``E_p w^2 - (E_p w)^2`` feature by feature, times the mass."""
        q, w, less = self._moments(weight)
        return self.mass[:, None] * (q @ w.square() - less)

    def total(self, weight: Float[Tensor, "d m"]) -> Float[Tensor, " p"]:
        """``E_p ||w||^2 - ||E_p w||^2``, times the mass."""
        q, w, less = self._moments(weight)
        return self.mass * (q @ w.square().sum(-1) - less.sum(-1))

    def trace(self) -> Float[Tensor, " p"]:
        """``1 - ||p||^2`` times the mass."""
        return self.mass * (2 * self.missing - self.missing.square() - self.others.square().sum(-1))

    def factor(self, eps: Float[Tensor, "p d"]) -> Float[Tensor, "p d"]:
        """``sqrt(p) eps - p <sqrt(p), eps>`` times the root of the mass (I7)."""
        root = (0.5 * self.log_p).exp()
        along = (root * eps).sum(-1, keepdim=True)
        return self.mass.sqrt()[:, None] * (root * eps - self.log_p.exp() * along)

    def product(self, v: Float[Tensor, "p d"]) -> Float[Tensor, "p d"]:
        """``p (v - <p, v>)`` times the mass; v counted from its entry k, so that what is left keeps its digits."""
        away = v - v.gather(-1, self.k)
        p, mean = self.log_p.exp(), (self.others * away).sum(-1, keepdim=True)
        return self.mass[:, None] * p * (away - mean)

    def times(self, constant: float) -> "SoftmaxHessian":
        """The mass times the constant."""
        scaled = copy.copy(self)
        scaled.mass = self.mass * constant
        return scaled


class DiagonalHessian:
    """``A_p = diag(a_p)``: losses that are sums over the outputs, each of one output (I2)."""

    def __init__(self, a: Float[Tensor, "p d"]) -> None:
        self.a = a

    def diagonal(self, weight: Float[Tensor, "d m"]) -> Float[Tensor, "p m"]:
        """``sum_c a_c w_c^2`` feature by feature."""
        return self.a @ weight.square()

    def total(self, weight: Float[Tensor, "d m"]) -> Float[Tensor, " p"]:
        """``sum_c a_c ||w_c||^2``."""
        return self.a @ weight.square().sum(-1)

    def trace(self) -> Float[Tensor, " p"]:
        """``sum_c a_c``."""
        return self.a.sum(-1)

    def factor(self, eps: Float[Tensor, "p d"]) -> Float[Tensor, "p d"]:
        """``sqrt(a) eps``; without the infinite slope of the root where ``a`` is 0."""
        live = self.a > 0
        return torch.where(live, torch.where(live, self.a, 1.0).sqrt(), 0.0) * eps

    def product(self, v: Float[Tensor, "p d"]) -> Float[Tensor, "p d"]:
        """``a v``."""
        return self.a * v

    def times(self, constant: float) -> "DiagonalHessian":
        """The entries times the constant."""
        return DiagonalHessian(self.a * constant)
