r"""Gradients of ``sum_p a_p (task_p + strength kappa_p)`` in features, weight and bias, a chunk of tokens at a time.

Write ``D = pi - t``, ``beta_p = strength a_p ||phi_p||^2``, and for the third derivatives
``K_pc = pi_pc (||w_c - mu_p||^2 - v_p)``, which is ``d v_p / d z_pc``. Then

    d/dz     = a D + beta K
    d/dphi   = 2 strength a v phi + (d/dz) W
    d/dw_c   = ((d/dz)' phi)_c + 2 sum_p beta_p pi_pc (w_c - mu_p)
    d/db     = sum_p d/dz_p

The terms with K are the part of Lemma 1 that goes through the third derivatives: ``gradient="full"``. Without them
the curvature is constant (``"frozen"``), and without ``2 strength a v phi`` too, only W sees kappa (``"weights"``).

With a sketch, gradients are those of the estimate, and so unbiased; but what needs no product of tokens and classes
is exact in the gradient in W: ``2 w_c sum_p beta_p pi_pc``, and what is common to all mu_p. The rest of it,
``2 sum_p beta_p pi_pc mu_p``, keeps a relative noise of about ``sqrt(m / k)``, which averages out over steps as that
of batches does.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from relflat.vocabulary import blocks as on_blocks
from relflat.vocabulary.rows import Rows
from relflat.vocabulary.softmax import Softmax, Tokens


class Gradients:
    """Sums over the chunks so far; complete after :meth:`finish`.

    Attributes:
        phi: gradient in the features, None where not wanted; so are the next two.
        weight: in the weight.
        bias: in the bias.
        kappa_rows: of kappa alone, in the rows that it sees; the same tensor as ``weight`` if these are those of W.
        beta_pi: ``sum_p beta_p pi_pc``, a number for each class.
        typical: a mean of mu over tokens, minus the mean row, as features; 0 without a sketch.
        typical_sketch: the same mean as the sketch has it.
        from_smoothing: ``sum_p a_p s / d phi_p``, what label smoothing takes from each row.
    """

    def __init__(
        self,
        rows: Rows,
        wanted: Sequence[Tensor | None],
        *,
        strength: float,
        smoothing: float,
        through_features: bool,
        through_logits: bool,
    ) -> None:
        self.rows, self.strength, self.smoothing = rows, strength, smoothing
        self.through_features, self.through_logits = through_features, through_logits and strength != 0
        made = [None if x is None else torch.zeros_like(x, dtype=rows.dtype) for x in wanted]
        self.phi, self.weight, self.bias = made
        self.kappa_rows = self.weight
        if rows.sketch is not None and self.weight is not None:
            self.kappa_rows = torch.zeros_like(rows.sketch)
        self.beta_pi, self.from_smoothing = torch.zeros_like(rows.norms), torch.zeros_like(rows.mean)
        self.typical, self.typical_sketch = torch.zeros_like(rows.mean), torch.zeros_like(rows.kappa_mean)

    def add(self, at: slice, t: Tokens, x: Softmax) -> None:
        """Add what the tokens at ``at`` give."""
        if at.start == 0 and self.rows.sketch is not None and self.kappa_rows is not None:
            self._find_typical(t, x)
        if self.phi is not None and self.through_features:
            self.phi[at] += 2 * self.strength * t.a * x.v * t.phi  # d ||phi||^2 = 2 phi
        if self.through_logits or self.rows.sketch is not None:
            self._by_logits(at, t, x)
        else:
            self._by_mean(at, t, x)
        if self.smoothing:
            share = self.smoothing / len(self.rows.norms)
            self.from_smoothing += share * (t.a * t.phi).sum(0)
            if self.bias is not None:
                self.bias -= share * t.a.sum()
        if self.kappa_rows is not None and self.strength:
            self._gram_of_most_likely(self.kappa_rows, t, x)

    def finish(self) -> None:
        """Add what is the same for all tokens of a class."""
        if self.weight is None:
            return
        for c in self.rows.classes():
            if self.strength:
                # 2 sum_p beta_p pi_pc (w~_c - typical); the rest, with typical - mu_p, is in kappa_rows.
                centred = self.rows.of_weight(c) - self.rows.mean - self.typical
                self.weight[c] += 2 * self.beta_pi[c, None] * centred
                if self.rows.directions is not None and self.kappa_rows is not None:
                    self.weight[c].addmm_(self.kappa_rows[c], self.rows.directions.mT)  # V = W~ G
            if self.smoothing:
                self.weight[c] -= self.from_smoothing

    def _find_typical(self, t: Tokens, x: Softmax) -> None:
        """The mean of mu over some tokens, weighted by ``||phi||^2``: what is common to mu needs no sketch."""
        share = t.norm2 * x.largest / t.norm2.sum().clamp_min(torch.finfo(self.rows.dtype).tiny)
        pi = torch.cat([e.mT @ share for _, e in x.blocks])[:, 0].index_add_(0, x.k[:, 0], share[:, 0])
        for c in self.rows.classes():
            self.typical += pi[c] @ (self.rows.of_weight(c) - self.rows.mean)
            self.typical_sketch += pi[c] @ self.rows.of_kappa(c)

    def _by_mean(self, at: slice, t: Tokens, x: Softmax) -> None:
        """``d/dz = a D``, and no sketch: mu gives D W, and both losses share a product with pi."""
        if self.phi is not None:
            # D W = mu - sum_c t_c w_c, with mu = w_k + delta and t = (1 - s) e_y + s / d
            w_y = self.rows.of_weight(t.y[:, 0])
            self.phi[at] += t.a * (x.w_k - w_y + x.delta + self.smoothing * (w_y - self.rows.mean))
        at_k, at_y = self._apart(t, x)
        both = x.largest * (t.a * t.phi - 2 * t.beta * x.mu)  # pi_pc (a phi - 2 beta mu) for all c but k
        for c, e in x.blocks:
            if self.weight is not None:
                self.weight[c].addmm_(e.mT, both)
                self.beta_pi[c] += e.mT @ (t.beta * x.largest)[:, 0]
            if self.bias is not None:
                self.bias[c] += e.mT @ (t.a * x.largest)[:, 0]
        for column, value in ((x.k, at_k), (t.y, at_y)):
            if self.weight is not None:
                self.weight.index_add_(0, column[:, 0], value * t.phi)
            if self.bias is not None:
                self.bias.index_add_(0, column[:, 0], value[:, 0])

    def _by_logits(self, at: slice, t: Tokens, x: Softmax) -> None:
        """``d/dz = a D + beta K`` is made for a block of classes at a time, and goes on to all three gradients."""
        at_k, at_y = self._apart(t, x)
        slope, level = t.beta * x.largest, t.a * x.largest  # times e they are beta pi and a pi
        if self.through_logits:
            # With w_bar the mean of all w_c and ~ for "minus w_bar", ||w_c - mu||^2 - v =
            # ||w~_c||^2 - 2 w_c . mu~ + (2 w_bar . mu~ + ||mu~||^2 - v): by class, as a product, and by token.
            rest = 2 * (x.mu @ self.rows.kappa_mean[:, None]) + x.mu.square().sum(1, keepdim=True) - x.v
            level = slope * rest + level
            at_k = at_k + slope * (x.delta.square().sum(1, keepdim=True) - x.v)  # w_k - mu = -delta
        kernels = on_blocks.kernels_for(x.largest)
        room = torch.empty_like(x.blocks[0].values).view(-1)
        for c, e in x.blocks:
            dz = room[: e.numel()].view_as(e)
            if self.through_logits:
                kernels.curve(e, -2 * slope * x.mu, self.rows.of_kappa(c), self.rows.norms[c], slope, level, dz)
            else:
                torch.mul(e, level, out=dz)
            on_blocks.add(dz, x.k - c.start, at_k)
            on_blocks.add(dz, t.y - c.start, at_y)
            self._from_logits(at, c, dz, t.phi)
            if self.kappa_rows is not None and self.strength:
                self.kappa_rows[c].addmm_(e.mT, -2 * slope * (x.mu - self.typical_sketch))
                self.beta_pi[c] += e.mT @ slope[:, 0]
        if self.phi is not None and self.smoothing:
            self.phi[at] -= self.smoothing * t.a * self.rows.mean  # s / d sum_c w_c

    def _from_logits(self, at: slice, c: slice, dz: Float[Tensor, "p c"], phi: Float[Tensor, "p m"]) -> None:
        """``z = phi W' + b`` differentiated, for a block of classes."""
        if self.phi is not None:
            self.phi[at].addmm_(dz, self.rows.of_weight(c))
        if self.weight is not None:
            self.weight[c].addmm_(dz.mT, phi)
        if self.bias is not None:
            self.bias[c] += dz.sum(0)

    def _apart(self, t: Tokens, x: Softmax) -> tuple[Float[Tensor, "p 1"], Float[Tensor, "p 1"]]:
        """What ``a D`` has in columns k and y beside ``a pi`` of the blocks, which lack k.

        The ``- a s / d`` of label smoothing, which all columns have, is ``from_smoothing``. Then column k has
        ``a pi_k``, less ``a (1 - s)`` if k is the target, where ``pi_k - 1 = -others largest`` does not cancel.
        """
        s, right = self.smoothing, x.k == t.y
        at_k = t.a * torch.where(right, s - x.others * x.largest, x.largest)
        return at_k, (s - 1) * t.a * ~right

    def _gram_of_most_likely(self, kappa_rows: Float[Tensor, "d r"], t: Tokens, x: Softmax) -> None:
        """Class k in ``2 beta pi (w - mu)``, where ``w_k - mu = -delta``.

        With a sketch it is split as for the other classes, w_k exact and mu through the directions, unless a token is
        sure of its class: then w_k and mu are nearly the same, and only through the same directions do they cancel.
        """
        slope, difference = t.beta * x.largest, x.delta
        if self.rows.sketch is not None:
            sure = x.largest > 0.5
            difference = torch.where(sure, x.delta, x.mu - self.typical_sketch)
            self.beta_pi.index_add_(0, x.k[:, 0], (slope * ~sure)[:, 0])
        kappa_rows.index_add_(0, x.k[:, 0], -2 * slope * difference)
