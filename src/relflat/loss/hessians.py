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

    def diagonal(self, weight: Float[Tensor, "d m"]) -> Float[Tensor, "p m"]:
        """``E_p w^2 - (E_p w)^2`` feature by feature, times the mass."""
        q = self.others.scatter(-1, self.k, -self.missing[:, None])
        w = weight - weight.detach().mean(0)  # kappa does not see their mean, but rounding does
        mean = q @ w
        return self.mass[:, None] * (q @ w.square() - mean * (2 * w[self.k[:, 0]] + mean))

    def kappa(self, weight: Float[Tensor, "d m"], phi: Float[Tensor, "p m"]) -> Float[Tensor, " p"]:
        """``E_p ||w||^2 - ||E_p w||^2``, times the mass and ``||phi||^2``."""
        found: Tensor = _SoftmaxKappa.apply(self.logits, weight, phi, self.mass)  # type: ignore[no-untyped-call]
        return found

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


class _SoftmaxKappa(torch.autograd.Function):
    """:meth:`SoftmaxHessian.kappa` with its gradient written out: few operations, and little kept."""

    @staticmethod
    def of(z: Tensor, weight: Tensor, phi: Tensor, mass: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Kappa, and what its gradient is made of: with ``q = p - e_k``, ``V = q.||w||^2 - <q W, 2 w_k + q W>``."""
        p, k = z.softmax(-1), z.argmax(-1, keepdim=True)
        others = p.scatter(-1, k, 0.0)
        q = others.scatter(-1, k, -others.sum(-1, keepdim=True))
        w = weight - weight.detach().mean(0)
        size, at_k = w.square().sum(-1), w.index_select(0, k.view(-1))
        mean = q @ w
        less = (mean * torch.add(mean, at_k, alpha=2)).sum(-1)
        variance = torch.addmv(less, q, size, beta=-1) * mass
        energy = phi.square().sum(-1)
        return variance * energy, (p, k, q, w, size, at_k, mean, variance, energy)

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        kappa, rest = _SoftmaxKappa.of(*given)
        ctx.save_for_backward(*given, *rest)
        return kappa

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        """``dV/dz = p (r - p.r)`` with ``r_c = ||w_c||^2 - 2 <w_c, E_p w>``, and ``dV/dw_c = 2 p_c (w_c - E_p w)``.

        Both in ``q``, as all of them is of the size of what is missing to certainty.
        """
        given, (p, k, q, w, size, at_k, mean, variance, energy) = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # to be differentiated again
            wanted = [x for x, need in zip(given, needs, strict=True) if need]
            found = iter(torch.autograd.grad(_SoftmaxKappa.of(*given)[0], wanted, v, create_graph=True))
            return tuple(next(found) if need else None for need in needs)
        in_z = in_w = in_phi = None
        if needs[2]:
            in_phi = given[2] * (2 * v * variance)[:, None]
        v = (v * given[3] * energy)[:, None]
        centre = at_k + mean
        if needs[0]:
            r = torch.addmm(size, centre, w.mT, alpha=-2)
            r = (r - r.gather(-1, k)) * v
            in_z = torch.ops.aten._softmax_backward_data(r, p, -1, p.dtype)
        if needs[1]:
            vq = q * v
            in_w = torch.addmm(vq.sum(0)[:, None] * w, vq.mT, centre, beta=2, alpha=-2)
            in_w.index_add_(0, k.view(-1), v * mean, alpha=-2)
        return in_z, in_w, in_phi, None


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
