"""Kappa as the trace of one operator over all of the data, by XTrace (Epperly, Tropp and Webber 2024).

Probes (:mod:`relflat.estimate.products`) draw other directions for every batch or sample, and their error falls as
the root of the number of products. Here one set of directions serves the whole data set. Half of the products find
the subspace where the operator is large, the other half its trace there, and each direction in turn, left out of the
subspace, samples what is missing. Where the spectrum decays the error falls far faster.
"""

import functools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from relflat.rng import Rng


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Coordinates x in R^n of changes of a weight W in which the trace of the curvature is kappa.

    ``kappa = Tr((F (x) I)' H (F (x) I))`` for any F with ``F F' = W W'``: by the definition with F = W, n = m m (I4).
    F from a QR decomposition of W' has min(d, m) columns, so that ``n = min(d, m) m``. If adaptive, x is the
    diagonal of R, and n = m (I9). For a stack of matrices x holds those of each.
    """

    weight: Float[Tensor, "*s d m"]  # with feature scales if there are any
    adaptive: bool

    @functools.cached_property
    def factor(self) -> Float[Tensor, "d k"]:
        """F, in the precision of the weight."""
        return torch.linalg.qr(self.weight.double().mT).R.mT.to(self.weight.dtype)

    @property
    def size(self) -> int:
        """The number of coordinates."""
        *stack, d, m = self.weight.shape
        return math.prod(stack) * m * (1 if self.adaptive else min(d, m))

    def change(self, x: Float[Tensor, " n"]) -> Float[Tensor, "d m"]:
        """The change of W that the coordinates stand for."""
        x = x.to(self.weight.dtype)
        *stack, _, m = self.weight.shape
        x = x.reshape(*stack, -1, m)
        return self.weight * x if self.adaptive else self.factor @ x

    def seen(self, gradient: Float[Tensor, "d m"]) -> Float[Tensor, " n"]:
        """The transpose of :meth:`change`."""
        found = (self.weight * gradient).sum(-2) if self.adaptive else self.factor.mT @ gradient
        return found.flatten().double()


class Sketch:
    """What is known of a symmetric operator on R^n from products with it, and its trace by XTrace.

    The products to be made next are those with the columns of ``pending``; :meth:`receive` takes them in. The trace
    is exact if there are as many as dimensions. The seed of the test vectors is the same on all ranks.

    Memory: ``Omega``, ``Q`` with the range of ``Y = A Omega`` and ``Z = A Q`` in float64, n by products / 2 each.
    """

    def __init__(self, coordinates: Coordinates, seed: int, products: int) -> None:
        self.coordinates, self.products = coordinates, products
        n, device = coordinates.size, coordinates.weight.device
        self.exact = products >= n
        if self.exact:
            self.omega = torch.eye(n, dtype=torch.float64, device=device)
        else:
            like = torch.empty(n, products // 2, dtype=torch.float64, device=device)
            self.omega = Rng(seed, 0, shared=True).normal(like)
        self.pending: Tensor | None = self.omega
        self._q: Tensor | None = None

    def receive(self, images: Float[Tensor, "n k"]) -> None:
        """Take in the operator's images of the pending columns."""
        if self.exact:
            self._estimates, self.pending = images.trace()[None], None
        elif self._q is None:
            self._q = torch.linalg.qr(images).Q
            self._r = self._q.mT @ images  # so that Y = Q R
            self.pending = self._q
        else:
            self._estimates, self.pending = self._leaving_one_out(self._q, images), None

    def _leaving_one_out(self, q: Float[Tensor, "n k"], z: Float[Tensor, "n k"]) -> Float[Tensor, " k"]:
        """For each test vector w: the trace on the range of the others' images, and w's sample of the rest.

        In the basis Q the range without image i is what is orthogonal to ``s_i``, column i of the inverse transpose
        of ``R = Q' Y``. The part of w outside of it has a uniform direction there, and is given the mean square of
        its length (the normalised form of Epperly et al., section 2).
        """
        n, k = self.omega.shape
        low, across, along = q.mT @ z, self.omega.mT @ z, q.mT @ self.omega
        left, values, right = torch.linalg.svd(self._r)
        tiny = torch.finfo(values.dtype)
        # an operator of low rank leaves some directions of Q arbitrary; any of them may be left out
        relative = (values / values[0].clamp_min(tiny.tiny)).clamp_min(tiny.eps)
        s = left @ (right / relative[:, None])
        s = s / torch.linalg.vector_norm(s, dim=0)
        inside = along - s * (s * along).sum(0)
        # of w - Q inside: its product with A (w - Q inside) and its square, by inner products of k columns
        energy = ((along - inside) * self._r).sum(0) - ((across.mT - low.mT @ inside) * inside).sum(0)
        length2 = self.omega.square().sum(0) - inside.square().sum(0)
        return low.trace() - (s * (low @ s)).sum(0) + (n - k + 1) * energy / length2

    @property
    def value(self) -> float:
        """The trace."""
        return float(self._estimates.mean())

    @property
    def variance(self) -> float:
        """XTrace's own estimate of its squared error: that of the mean if the estimates were independent, and wider.

        They are not quite: on small networks its root was 10 to 25 % below the true error. And as that of few numbers
        it is as uncertain as Student's distribution says, whose tail of one in a thousand the factor follows.
        """
        k = len(self._estimates)
        return 0.0 if self.exact else 3 * (1 + 20 / (k - 1) ** 2) ** 2 * float(self._estimates.var()) / k

    def method(self, curvature: str) -> str:
        """What was done, in words."""
        return "exact" if self.exact else f"xtrace({curvature}, {self.products})"
