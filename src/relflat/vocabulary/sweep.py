"""The pass over tokens and classes behind ``linear_cross_entropy_fam``; its docstring has the formulas and names.

Logits are kept for a chunk of tokens at a time, as one contiguous block for each chunk of classes: rows a power of
two apart make matrix products slower by a fifth. The most likely class k of a token is left out of the blocks and
added exactly, so that nothing cancels when a token is certain.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from relflat.options import Gradient
from relflat.vocabulary import blocks as on_blocks

Reduction = Literal["mean", "sum", "none"]


@dataclass(frozen=True)
class SweepOptions:
    """What :class:`Sweep` needs to know; the names are those of ``linear_cross_entropy_fam``.

    Attributes:
        strength: lambda.
        smoothing: label smoothing.
        gradient: full, frozen or weights.
        chunk_tokens: tokens at a time.
        chunk_classes: classes at a time.
        reduction: of the loss.
        differentiate: whether gradients may be asked for.
    """

    strength: float
    smoothing: float
    gradient: Gradient
    chunk_tokens: int
    chunk_classes: int
    reduction: Reduction
    differentiate: bool


class Sweep:
    """One pass over tokens and classes.

    Attributes:
        task: cross-entropy of each token, not weighted.
        kappa: ``||phi||^2 v`` of each token, not weighted.
        gradients: of the weighted total in features, weight and bias; None where not wanted.
    """

    def __init__(
        self,
        phi: Float[Tensor, "n m"],
        weight: Float[Tensor, "d m"],
        bias: Float[Tensor, " d"] | None,
        y: Int[Tensor, " n"],
        directions: Float[Tensor, "m k"] | None,
        options: SweepOptions,
        wanted: tuple[bool, ...],
    ) -> None:
        self.phi, self.weight, self.bias, self.y, self.options = phi, weight, bias, y, options
        self.directions = directions
        self.wide = torch.promote_types(torch.promote_types(phi.dtype, weight.dtype), torch.float32)
        self.task, self.kappa = (torch.empty(len(y), dtype=self.wide, device=phi.device) for _ in range(2))
        blanks = [None if x is None else torch.zeros_like(x, dtype=self.wide) for x in (phi, weight, bias)]
        self.gradients = [x if wants else None for x, wants in zip(blanks, wanted, strict=True)]

    def run(self, mass: Float[Tensor, " n"]) -> None:
        """Fill the attributes, with ``mass`` as the weights a."""
        with torch.autocast(self.phi.device.type, enabled=False), torch.no_grad():
            self._prepare()
            n, size = len(self.y), min(self.options.chunk_tokens, len(self.y))
            buffer = self.norms.new_empty(size * len(self.norms))
            for at in _slices(n, size or 1):
                x = self._softmax(at, buffer)
                if at.start == 0 and self.directions is not None and self.slopes is not None:
                    self._typical(at, x)
                if any(g is not None for g in self.gradients):
                    self._gradients(at, x, mass[at, None])
            if self.gradients[1] is not None:
                self._finish(self.gradients[1])

    def _prepare(self) -> None:
        """The rows that kappa sees: those of W, or the centred ones along the directions."""
        self.centre = self.weight.mean(0, dtype=self.wide)
        if self.directions is None:
            self.seen, self.middle = None, self.centre
        else:
            g = self.directions.to(self.wide)
            self.seen = torch.cat([(self._rows(c) - self.centre) @ g for c in self._classes()])
            self.middle = torch.zeros_like(self.seen[0])
        squares = ((self._seen(c) - self.middle).square_().sum(1) for c in self._classes())
        self.norms = torch.cat(list(squares))
        self.slopes = self.gradients[1]  # gradient in the rows that kappa sees
        if self.seen is not None and self.slopes is not None:
            self.slopes = torch.zeros_like(self.seen)
        self.scales = torch.zeros_like(self.norms)  # sum_p beta pi, but for classes that are apart
        self.typical, self.typical_seen = torch.zeros_like(self.centre), torch.zeros_like(self.middle)
        self.pull = torch.zeros_like(self.centre)  # what smoothing adds to all rows
        self.kernels = on_blocks.kernels_for(self.norms)

    def _typical(self, at: slice, x: "_Softmax") -> None:
        """The mean of mu over some tokens: what is common to mu needs no random directions."""
        norm2 = self.phi[at].to(self.wide).square().sum(1, keepdim=True)
        share = norm2 * x.largest / norm2.sum().clamp_min(torch.finfo(self.wide).tiny)
        weights = torch.cat([e.mT @ share for _, e in x.blocks])[:, 0].index_add_(0, x.k[:, 0], share[:, 0])
        for c in self._classes():
            self.typical += weights[c] @ (self._rows(c) - self.centre)
            self.typical_seen += weights[c] @ self._seen(c)

    def _softmax(self, at: slice, buffer: Tensor) -> "_Softmax":
        """Losses and kappas of some tokens, and what their gradients need."""
        o, phi, y = self.options, self.phi[at].to(self.wide), self.y[at, None]
        blocks = list(self._blocks(len(phi), buffer))
        top, k = phi.new_full((len(phi), 1), -torch.inf), torch.zeros_like(y)
        expected, all_logits = torch.zeros_like(top), torch.zeros_like(top)
        for c, z in blocks:
            torch.mm(phi, self._rows(c).mT, out=z)
            bias = None if self.bias is None else self.bias[c].to(self.wide)
            self.kernels.raise_top(z, bias, c.start, top, k)
            expected += on_blocks.pick(z, y - c.start)
            if o.smoothing:
                all_logits += z.sum(1, keepdim=True)
        expected = (1 - o.smoothing) * expected + o.smoothing / len(self.norms) * all_logits
        w_k = self._seen(k[:, 0])
        others, second, delta = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(w_k)
        for c, z in blocks:
            self.kernels.exponentials(z, top, k - c.start, self.norms[c], others, second)
            delta.addmm_(z, self._seen(c))
        largest = 1 / (1 + others)
        delta = largest * (delta - others * w_k)
        around = delta * (2 * (w_k - self.middle) + delta)
        v = largest * (second - others * self.norms[k]) - around.sum(1, keepdim=True)
        self.task[at] = (top - expected + others.log1p())[:, 0]
        self.kappa[at] = phi.square().sum(1) * v[:, 0]
        return _Softmax(blocks, largest, others, k, w_k, delta, v)

    def _gradients(self, at: slice, x: "_Softmax", a: Float[Tensor, "p 1"]) -> None:
        """Add what some tokens, of weights ``a``, give to the gradients."""
        o, phi = self.options, self.phi[at].to(self.wide)
        t = _Tokens(phi, self.y[at, None], a, o.strength * a * phi.square().sum(1, keepdim=True))
        d_phi = self.gradients[0]
        if d_phi is not None and o.gradient != "weights":
            d_phi[at] += 2 * o.strength * a * x.v * phi
        if self.seen is None and (o.gradient != "full" or not o.strength):
            self._through_mean(at, x, t)
        else:
            self._through_logits(at, x, t)
        share = o.smoothing / len(self.norms)
        self.pull += share * (a * phi).sum(0)
        if self.gradients[2] is not None:
            self.gradients[2] -= share * a.sum()
        if self.slopes is not None and o.strength:
            self._most_likely(x, t.beta * x.largest)

    def _most_likely(self, x: "_Softmax", slope: Float[Tensor, "p 1"]) -> None:
        """Class k in ``2 beta pi (w - mu)``: ``w - mu`` is ``-delta``, or for a sketch, if unsure, as for others."""
        assert self.slopes is not None
        difference = x.delta
        if self.directions is not None:
            sure = x.largest > 0.5
            difference = torch.where(sure, x.delta, x.w_k + x.delta - self.typical_seen)
            self.scales.index_add_(0, x.k[:, 0], (slope * ~sure)[:, 0])
        self.slopes.index_add_(0, x.k[:, 0], -2 * slope * difference)

    def _through_mean(self, at: slice, x: "_Softmax", t: "_Tokens") -> None:
        """Curvature held constant, all directions: mu gives D W, and both losses share a product with pi."""
        o, (d_phi, d_weight, d_bias) = self.options, self.gradients
        if d_phi is not None:
            w_y = self._rows(t.y[:, 0])
            d_phi[at] += t.a * (x.w_k - w_y + x.delta + o.smoothing * (w_y - self.centre))
        both = x.largest * (t.a * t.phi - 2 * t.beta * (x.w_k - self.middle + x.delta))
        at_k, at_y = self._apart(x, t)
        for c, e in x.blocks:
            if d_weight is not None:
                d_weight[c].addmm_(e.mT, both)
                self.scales[c] += e.mT @ (t.beta * x.largest)[:, 0]
            if d_bias is not None:
                d_bias[c] += e.mT @ (t.a * x.largest)[:, 0]
        for column, value in ((x.k, at_k), (t.y, at_y)):
            if d_weight is not None:
                d_weight.index_add_(0, column[:, 0], value * t.phi)
            if d_bias is not None:
                d_bias.index_add_(0, column[:, 0], value[:, 0])

    def _through_logits(self, at: slice, x: "_Softmax", t: "_Tokens") -> None:
        """The derivative in the logits, ``a D + beta K``, is made for a block at a time."""
        o, (d_phi, d_weight, d_bias) = self.options, self.gradients
        full = o.gradient == "full" and o.strength != 0
        nu = x.w_k - self.middle + x.delta
        slope = t.beta * x.largest
        level = 2 * (nu @ self.middle[:, None]) + nu.square().sum(1, keepdim=True) - x.v
        level = (slope * level if full else 0.0) + t.a * x.largest
        at_k, at_y = self._apart(x, t)
        if full:
            at_k = at_k + slope * (x.delta.square().sum(1, keepdim=True) - x.v)
        room = torch.empty_like(x.blocks[0][1]).view(-1)
        for c, e in x.blocks:
            dz = room[: e.numel()].view_as(e)
            if full:
                self.kernels.curve(e, -2 * slope * nu, self._seen(c), self.norms[c], slope, level, dz)
            else:
                torch.mul(e, level, out=dz)
            on_blocks.add(dz, x.k - c.start, at_k)
            on_blocks.add(dz, t.y - c.start, at_y)
            if d_phi is not None:
                d_phi[at].addmm_(dz, self._rows(c))
            if d_weight is not None:
                d_weight[c].addmm_(dz.mT, t.phi)
            if d_bias is not None:
                d_bias[c] += dz.sum(0)
            if self.slopes is not None and o.strength:
                self.slopes[c].addmm_(e.mT, -2 * slope * (nu - self.typical_seen))
                self.scales[c] += e.mT @ slope[:, 0]
        if d_phi is not None and o.smoothing:
            d_phi[at] -= o.smoothing * t.a * self.centre

    def _apart(self, x: "_Softmax", t: "_Tokens") -> tuple[Float[Tensor, "p 1"], Float[Tensor, "p 1"]]:
        """What ``a D`` has in columns k and y beside ``pi`` of the others, without what smoothing takes from all."""
        s, right = self.options.smoothing, x.k == t.y
        at_k = t.a * torch.where(right, s - x.others * x.largest, x.largest)
        return at_k, (s - 1) * t.a * ~right

    def _finish(self, d_weight: Float[Tensor, "d m"]) -> None:
        """Add what is the same for all tokens of a class."""
        for c in self._classes():
            if self.options.strength and self.slopes is not None:
                d_weight[c] += 2 * self.scales[c, None] * (self._rows(c) - self.centre - self.typical)
                if self.directions is not None:
                    d_weight[c].addmm_(self.slopes[c], self.directions.to(self.wide).mT)
            if self.options.smoothing:
                d_weight[c] -= self.pull

    def _rows(self, c: slice | Tensor) -> Float[Tensor, "c m"]:
        return self.weight[c].to(self.wide)

    def _seen(self, c: slice | Tensor) -> Float[Tensor, "c r"]:
        return self._rows(c) if self.seen is None else self.seen[c]

    def _classes(self) -> Iterator[slice]:
        return _slices(len(self.weight), self.options.chunk_classes)

    def _blocks(self, tokens: int, buffer: Tensor) -> Iterator[tuple[slice, Tensor]]:
        for c in self._classes():
            yield c, buffer[tokens * c.start : tokens * c.stop].view(tokens, c.stop - c.start)


class _Softmax(NamedTuple):
    """Softmax of a chunk of tokens.

    Attributes:
        blocks: probabilities divided by the largest, a block for each slice of classes; 0 for class k.
        largest: the largest probability.
        others: the sum of the others, divided by the largest.
        k: its class.
        w_k: the row of that class that kappa sees.
        delta: ``mu - w_k``, mu the mean of such rows.
        v: variance of such rows.
    """

    blocks: list[tuple[slice, Tensor]]
    largest: Float[Tensor, "p 1"]
    others: Float[Tensor, "p 1"]
    k: Int[Tensor, "p 1"]
    w_k: Float[Tensor, "p r"]
    delta: Float[Tensor, "p r"]
    v: Float[Tensor, "p 1"]


class _Tokens(NamedTuple):
    """A chunk of tokens: features, targets, weights in the loss, and ``strength a ||phi||^2``."""

    phi: Float[Tensor, "p m"]
    y: Int[Tensor, "p 1"]
    a: Float[Tensor, "p 1"]
    beta: Float[Tensor, "p 1"]


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
