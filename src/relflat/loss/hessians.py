"""Hessians of losses with respect to one row of logits, in the forms that kappa needs."""

import copy
import functools
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


class LogitHessian(Protocol):
    """Rows ``A_p = d2 L / dz_p2``, the weights and the reduction of the loss included."""

    def diagonal(self, weight: Float[Tensor, "d m"]) -> Float[Tensor, "p m"]:
        """The diagonal of ``W' A_p W``."""

    def kappa(self, weight: Float[Tensor, "d m"], phi: Float[Tensor, "p m"]) -> Float[Tensor, " p"]:
        """``||phi_p||^2 Tr(W' A_p W)``."""

    def trace(self) -> Float[Tensor, " p"]:
        """``Tr A_p``."""

    def factor(self, eps: Float[Tensor, "p d"]) -> Float[Tensor, "p d"]:
        """``S_p eps_p`` with ``S_p S_p' = A_p``."""

    def product(self, v: Float[Tensor, "p d"]) -> Float[Tensor, "p d"]:
        """``A_p v_p``."""

    def times(self, constant: float) -> "LogitHessian":
        """``constant * A_p``, for a constant that is not negative."""


_FEW = 25  # classes up to which distances between all rows of W are exact, and cheap


class SoftmaxHessian:
    """``A_p = mass_p (diag p - p p')``: cross-entropy (I1).

    Everything is written in ``q = p - e_k``, k the most likely class, whose entries are of the size of what
    is missing to certainty. So the variance keeps its relative accuracy when ``p`` is nearly one-hot, where
    ``E|w|^2 - |E w|^2`` would lose all of it.
    """

    def __init__(self, logits: Float[Tensor, "p d"], mass: Float[Tensor, " p"]) -> None:
        self.logits, self.mass = logits, mass

    @functools.cached_property
    def log_p(self) -> Float[Tensor, "p d"]:
        """Logarithms of the probabilities."""
        return F.log_softmax(self.logits, dim=-1)

    @functools.cached_property
    def k(self) -> Int[Tensor, "p 1"]:
        """The most likely classes."""
        return self.log_p.argmax(-1, keepdim=True)

    @functools.cached_property
    def others(self) -> Float[Tensor, "p d"]:
        """The probabilities of all others, and 0."""
        return self.log_p.exp().scatter(-1, self.k, 0.0)

    @functools.cached_property
    def missing(self) -> Float[Tensor, " p"]:
        """What is missing to certainty."""
        return self.others.sum(-1)

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

    def kappa(self, weight: Float[Tensor, "d m"], phi: Float[Tensor, "p m"]) -> Float[Tensor, " p"]:
        """The same times ``||phi||^2``."""
        if len(weight) > _FEW:
            return phi.square().sum(-1) * self.total(weight)
        found: Tensor = _OfPairs.apply(self.logits, weight, phi, self.mass)  # type: ignore[no-untyped-call]
        return found

    def trace(self) -> Float[Tensor, " p"]:
        """``1 - ||p||^2`` times the mass."""
        return self.mass * (2 * self.missing - self.missing.square() - self.others.square().sum(-1))

    def factor(self, eps: Float[Tensor, "p d"]) -> Float[Tensor, "p d"]:
        """``sqrt(p) eps - p <sqrt(p), eps>`` times the root of the mass (I7)."""
        root, eps = (0.5 * self.log_p).exp(), eps * self.mass.sqrt()[:, None]
        along = (root * eps).sum(-1, keepdim=True)
        return root * torch.addcmul(eps, root, along, value=-1)

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


class _OfPairs(torch.autograd.Function):
    """:meth:`SoftmaxHessian.kappa` for few classes, as ``1/2 sum_cc' p_c p_c' ||w_c - w_c'||^2``.

    No term is negative, so all digits stay; and with its gradient written out it takes few operations.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor, phi: Tensor, mass: Tensor) -> Tensor:
        p, gaps = z.softmax(-1), torch.cdist(weight, weight).square_().mul_(0.5)
        slope = p @ gaps
        variance, energy = (p * slope).sum(-1) * mass, phi.square().sum(-1)
        ctx.save_for_backward(z, weight, phi, mass, p, slope, variance, energy)
        return variance * energy

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        """``dV/dp = 2 slope`` and ``dV/dw_c = 2 sum_c' p_c p_c' (w_c - w_c')``."""
        z, weight, phi, mass, p, slope, variance, energy = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # to be differentiated again
            wanted = [x for x, need in zip((z, weight, phi), needs, strict=False) if need]
            value = phi.square().sum(-1) * SoftmaxHessian(z, mass).total(weight)
            found = iter(torch.autograd.grad(value, wanted, v, create_graph=True))
            return *(next(found) if need else None for need in needs[:3]), None
        v = 2 * v
        rows = (v * mass * energy)[:, None]
        in_z = in_w = None
        if needs[0]:
            in_z = torch.ops.aten._softmax_backward_data(slope * rows, p, -1, p.dtype)
        if needs[1]:
            pairs = (p.mT @ (p * rows)).fill_diagonal_(0)
            in_w = torch.addmm(pairs.sum(1)[:, None] * weight, pairs, weight, alpha=-1)
        return in_z, in_w, phi * (v * variance)[:, None] if needs[2] else None, None


class DiagonalHessian:
    """``A_p = diag(a_p)``: losses that are sums over the outputs, each of one output (I2)."""

    def __init__(self, a: Float[Tensor, "p d"]) -> None:
        self.a = a

    def diagonal(self, weight: Float[Tensor, "d m"]) -> Float[Tensor, "p m"]:
        """``sum_c a_c w_c^2`` feature by feature."""
        return self.a @ weight.square()

    def kappa(self, weight: Float[Tensor, "d m"], phi: Float[Tensor, "p m"]) -> Float[Tensor, " p"]:
        """``sum_c a_c ||w_c||^2``, times ``||phi||^2``."""
        return phi.square().sum(-1) * (self.a @ weight.square().sum(-1))

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
